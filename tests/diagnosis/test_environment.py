"""What is wrong with a machine, on machines that are made wrong."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from llama_eqx.diagnosis import environment
from llama_eqx.diagnosis.environment import check_lock, check_versions, examine_environment, requirements


@pytest.fixture
def installed(monkeypatch):
    """`installed(jax="0.9")` pretends versions; None is not installed."""
    real = importlib.metadata.version

    def pretend(**versions):
        names = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name):
            if names.get(name, "") is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return names.get(name) or real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "ROOM", 0)
    report = examine_environment()
    assert report.findings == ()
    assert f"jax {jax.__version__}" in str(report)
    assert f"{len(jax.devices())} x cpu" in str(report)


def test_requirements_are_those_of_the_project():
    assert "jax" in {requirement.name for requirement in requirements()}


@pytest.mark.parametrize(
    ("versions", "where", "words"),
    [
        ({"jax": "0.9.0", "jaxlib": "0.9.0"}, "jax", "0.9.0, but <0.12,>=0.10.2 is needed"),
        ({"equinox": None}, "equinox", "not installed"),
        ({"jaxlib": "0.10.1"}, "jaxlib", "they must have the same version"),
        ({"jax_cuda12_plugin": "0.9.2"}, "jax-cuda12-plugin", "they must have the same version"),
        ({"torch": "2.5.1+cu124"}, "torch", "CVE-2025-32434"),
        ({"transformers": "5.2.0"}, "transformers", "CVE-2026-4372"),
        ({"hydra_core": "1.4.0.dev3"}, "hydra-core", "another omegaconf"),
    ],
)
def test_versions_that_do_not_go_together(installed, versions, where, words):
    findings = []
    check_versions(requirements(), findings)
    assert findings == []
    installed(**versions)
    check_versions(requirements(), findings)
    assert any(finding.where == where and words in finding.what and "pip install" in finding.next for finding in findings)


def test_float64(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    findings = []
    check_versions([], findings)
    assert [finding.where for finding in findings] == ["JAX_ENABLE_X64"]


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_process_that_holds_the_tpu(installed, tmp_path, kind):
    installed(libtpu="0.0.42")
    lock = tmp_path / "lock"
    findings = []
    assert check_lock(lock, findings)
    lock.touch()
    assert check_lock(lock, findings)
    assert findings == []
    code = f"import fcntl, sys; f = open({str(lock)!r}, 'w'); fcntl.{kind}(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        if f":{lock.stat().st_ino} " not in pathlib.Path("/proc/locks").read_text():
            holder.stdin.close()
            pytest.skip("this kernel does not show locks")
        assert not check_lock(lock, findings)
        holder.stdin.close()
    (finding,) = findings
    assert f"process {holder.pid} holds the TPU" in finding.what


def test_a_lock_of_another_user(installed, tmp_path, monkeypatch):
    installed(libtpu="0.0.42")
    (tmp_path / "lock").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    findings = []
    assert not check_lock(tmp_path / "lock", findings)
    assert findings[0].next == f"sudo rm {tmp_path / 'lock'}"


def test_a_cache_that_cannot_be_written_and_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    report = examine_environment()
    assert any(finding.where == str(tmp_path / "file") and "cannot be written" in finding.what for finding in report.findings)
    assert any("0.0 GB are free" in finding.what for finding in report.findings)
    assert report.wrong


def test_no_devices(monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'\nand more")

    monkeypatch.setattr(jax, "devices", none)
    report = examine_environment()
    assert any(finding.what == "no device can be used: Unable to initialize backend 'tpu'" for finding in report.findings)
