"""How processes find each other and end together, between threads of one process, without JAX's own runtime."""

import socket
import threading
import time

import pytest

from llama_eqx import load_config, meeting, processes
from llama_eqx.errors import ConfigError, DataError
from llama_eqx.meeting import Lines, Place, meet
from llama_eqx.processes import DistributedConfig, together


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.fixture
def gathered(address, monkeypatch):
    """What `meet` gives or raises in each of the processes whose configs are given by number.

    Their threads are over before a test's own `end` is taken back: what they end with the real one is the process of the tests.
    """
    lines = []
    yield lambda *args, **kwargs: lines.append(gather(address, *args, **kwargs)) or lines[-1]
    opened = [found for each in lines for found in each.values() if isinstance(found, Lines)]
    for found in opened:
        found._over.set()
    for found in opened:
        found.close()


def gather(address, configs, timeout=10.0, processes=None, heartbeat=60.0):
    found = {}

    def come(i):
        try:
            found[i] = meet(Place(i, processes or len(configs), address), timeout, configs[i], heartbeat)
        except ConfigError as error:
            found[i] = error

    threads = [threading.Thread(target=come, args=(i,)) for i in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def until(happened):
    for _ in range(200):
        if happened():
            return
        time.sleep(0.05)


def test_all_take_the_config_of_the_first(gathered):
    found = gathered({i: {"seed": 1, "run_dir": f"at {i}", "distributed": {"process": i}} for i in range(3)})
    assert [found[i].config["run_dir"] for i in range(3)] == ["at 0"] * 3


def test_a_process_that_does_not_come_is_named_to_all(gathered, address):
    found = gathered({0: {}, 2: {}}, timeout=1.0, processes=4)
    assert found[0].what == found[2].what == f"of 4 processes, numbers 1, 3 did not reach {address} within 1 s"
    assert found[0].code == 2


def test_a_first_process_that_does_not_come_is_named(gathered, address):
    said = gathered({1: {}}, timeout=0.5, processes=2)[1].what
    assert said == f"process 0 of 2 did not answer at {address} within 0.5 s (Connection refused)"


def test_another_config_is_named_to_all(gathered):
    found = gathered({0: {"seed": 1, "train": {"steps": 3}}, 1: {"seed": 2, "train": {"steps": 3}}})
    assert found[0].what == found[1].what
    assert found[0].what.endswith("has a different config from process 0, seed: 1 -> 2")


@pytest.mark.parametrize(
    "said",
    [
        "GET / HTTP/1.1\r\n\r",
        '{"process": null, "host": "h", "config": {}}',
        '{"process": 1e400, "host": "h", "config": {}}',
        '{"process": 1, "host": "h", "config": 3}',
        '{"process": 1, "host": "h"}',
        "[" * 100_000,
    ],
    ids=lambda said: said[:40],
)
def test_strangers_are_not_taken_for_a_process(said, gathered, address, monkeypatch):
    judged, call = threading.Event(), meeting._call
    monkeypatch.setattr(meeting, "_call", lambda *arguments: judged.wait(10) and call(*arguments))

    def stranger():
        host, port = address.split(":")
        for _ in range(50):
            try:
                with socket.create_connection((host, int(port)), 3) as line:
                    line.sendall(said.encode() + b"\n")
                    line.recv(1)  # until it hangs up
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        judged.set()

    threading.Thread(target=stranger).start()
    assert isinstance(gathered({0: {}, 1: {}})[0], Lines)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_ends_the_others_and_is_told_there(failing, gathered, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(meeting, "end", ended.append)
    monkeypatch.setattr(meeting, "LAST_WORDS", 0.1)
    found = gathered({i: {} for i in range(3)})
    with pytest.raises(DataError), found[failing]:
        raise DataError("a row is damaged", where="row 7")
    until(lambda: len(ended) == 2)
    assert ended == [3, 3]
    err = capsys.readouterr().err
    teller = f"process 1 on {socket.gethostname()}: " if failing else ""
    assert err.count(f"{teller}error: a row is damaged\nwhere: row 7") == 2


@pytest.mark.parametrize(
    "said", ['{"x": 1}', '{"error": "it failed"}', '{"error": "it failed", "code": "x"}', "3", "[" * 100_000], ids=lambda s: s[:40]
)
def test_a_process_that_says_what_no_process_says_is_lost(said, gathered, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(meeting, "end", ended.append)
    monkeypatch.setattr(meeting, "LAST_WORDS", 0.1)
    found = gathered({0: {}, 1: {}})
    found[1]._peers["process 0"]._socket.sendall(said.encode() + b"\n")
    until(lambda: 75 in ended)
    assert 75 in ended
    assert "error: ended without saying why" in capsys.readouterr().err


def test_a_process_that_vanishes_ends_the_first_for_another_start(gathered, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(meeting, "end", ended.append)
    monkeypatch.setattr(meeting, "LAST_WORDS", 0.1)
    found = gathered({0: {}, 1: {}})
    found[1]._peers["process 0"].hang_up()
    until(lambda: 75 in ended)
    assert 75 in ended
    assert "ended without saying why" in capsys.readouterr().err


def test_an_end_without_error_is_no_error(gathered, monkeypatch):
    ended = []
    monkeypatch.setattr(meeting, "end", ended.append)
    found = gathered({0: {}, 1: {}})
    with found[1]:
        pass
    with found[0]:
        time.sleep(0.2)
    time.sleep(0.2)
    assert not ended


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, Place(2, 4, "node7:61440")),
    ],
)
def test_what_is_found_in_the_environment(environment, place, monkeypatch):
    slurm = {"SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[7-8]", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}
    for name, value in {**(slurm if "SLURM_NTASKS" in environment else {}), **environment}.items():
        monkeypatch.setenv(name, value)
    nowhere = DistributedConfig(coordinator=None, processes=None, process=None, timeout=1, heartbeat=60, stall=None)
    assert processes._place(nowhere)[0] == place


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["distributed.process=1"], "not given: coordinator, processes"),
        (["distributed.coordinator=a:1", "distributed.processes=2", "distributed.process=2"], "there is no process 2 of 2"),
        (["distributed.coordinator=a", "distributed.processes=2", "distributed.process=1"], "a has no port"),
    ],
)
def test_places_that_cannot_be(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_config(*overrides)


def test_the_environment_may_name_the_place(monkeypatch):
    for name, value in {"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    found = load_config().distributed
    assert (found.coordinator, found.processes, found.process) == ("a:1", 2, 1)


def test_a_single_process_stays_alone():
    config = load_config()
    with together(config) as (same, process):
        assert (same, process) == (config, 0)


@pytest.mark.parametrize("beats", [False, True])
def test_a_process_without_a_sign_of_life_is_lost(gathered, monkeypatch, capsys, beats):
    ended = []
    monkeypatch.setattr(meeting, "end", ended.append)
    monkeypatch.setattr(meeting, "LAST_WORDS", 0.1)
    if not beats:
        monkeypatch.setattr(Lines, "_beat", lambda self: None)
    assert len(gathered({0: {}, 1: {}}, heartbeat=0.5)) == 2
    time.sleep(1.5)
    assert ended == ([] if beats else [75, 75])
    err = capsys.readouterr().err
    assert ("error: no sign of life for 0.5 s" in err and "thread MainThread, most recent call last:" in err) is not beats
