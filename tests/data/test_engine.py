import pathlib
import time

import pytest

from llama_eqx.data import cores, engine
from llama_eqx.data.engine import EngineConfig


def say_threads(file: str) -> None:
    pathlib.Path(file).write_text(str(cores.threads()))
    time.sleep(0.5)  # so that each worker has a call


@pytest.mark.parametrize(("workers", "share"), [(2, 3), (7, 1)])
def test_workers_share_the_cores(tmp_path, monkeypatch, workers, share):
    monkeypatch.setattr(engine, "cores", lambda: 6)
    with EngineConfig(engine="local", workers=workers).open() as pool:
        assert sorted(pool(say_threads, [(str(tmp_path / str(i)),) for i in range(3)])) == [0, 1, 2]
    assert [(tmp_path / str(i)).read_text() for i in range(3)] == [str(share)] * 3


def test_a_process_alone_has_all_cores_unless_it_is_told(monkeypatch):
    monkeypatch.delenv(cores.THREADS, raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert cores.threads() == cores.cores() >= 1
    for said, count in (("3", 3), ("0", cores.cores()), ("many", cores.cores())):  # Rayon takes 0 for all
        monkeypatch.setenv(cores.THREADS, said)
        assert cores.threads() == count
    cores.allow(2)
    assert cores.threads() == 2
