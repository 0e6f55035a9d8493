"""How figures are written up."""

import json

from benchmarks.run import in_words


def test_a_table_leaves_no_figure_out():
    said = {"name": "windows", "batch_s": 0.2772142300000269, "tokens": 1935888160, "rounds": [3, 1, 2], "grown": {"resident": 12.5}}
    head, _, row = in_words(json.dumps(said)).splitlines()
    assert head == "| name | batch s | tokens | rounds | grown, resident |"
    assert row == "| windows | 0.277 | 1,935,888,160 | 1 to 3 | 12.5 |"
