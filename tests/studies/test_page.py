"""What a report is written with."""

from llama_eqx.studies.page import Page
from llama_eqx.studies.plots import figure


def test_a_page_written_twice_is_the_same_bytes(tmp_path):
    def written(folder):
        made, axes = figure()
        axes.fill_between([0, 1], [0, 0], [1, 2], alpha=0.5)  # clipped, and a clip path has an id
        page = Page("A page")
        page.figure("band", made, "a band")
        return [path.read_bytes() for path in page.write(folder, "page")] + [(folder / "band.png").read_bytes()]

    assert written(tmp_path / "a") == written(tmp_path / "b")
