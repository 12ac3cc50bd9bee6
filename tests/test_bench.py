"""Times, ceilings, counted work, and the files of tables."""

import json
import os
import re
import subprocess
import time

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from fusionkit import bench
from fusionkit.models import onednn


def test_the_warm_up_is_not_measured_and_the_median_is_taken(monkeypatch):
    seconds = iter([9.0, 0.4, 0.1, 0.2])
    monkeypatch.setattr(bench, "seconds_of", lambda function, device: next(seconds))
    timing = bench.timed(lambda: None, repeats=3)
    assert timing[:2] == (0.2, 0.1)
    assert timing.spread == pytest.approx(0.3 / 0.2)
    assert timing.calls == 3


@pytest.mark.parametrize(("limit", "calls"), [(10.0, 4), (0.0, 1)])
def test_a_slow_function_is_called_less_often(limit, calls):
    done = []
    timing = bench.timed(lambda: done.append(time.sleep(0.001)), repeats=4, limit=limit)
    assert timing.calls == calls
    # Beyond the limit the first call is the measurement, and there is no warm-up.
    assert len(done) == (5 if limit else 1)
    assert timing.minimum >= 0.001


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="repeats is 0, expected at least 1"):
        bench.timed(lambda: None, repeats=0)


def test_the_machine_is_named():
    facts = bench.machine()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    assert facts["name"]
    assert facts["memory"] > 0.1


@pytest.mark.parametrize(
    ("facts", "slug"),
    [
        ({"name": "AMD EPYC", "threads": 2}, "amd-epyc-2-threads"),
        (
            {"name": "Intel(R) Core(TM) i7 @ 3.00GHz", "threads": 1},
            "intel-r-core-tm-i7-3-00ghz-1-thread",
        ),
        ({"name": "NVIDIA H100 80GB HBM3"}, "nvidia-h100-80gb-hbm3"),
    ],
)
def test_a_machine_s_slug(facts, slug, monkeypatch):
    monkeypatch.setattr(bench, "machine", lambda device: facts)
    assert bench.device_slug() == slug


def test_ceilings_are_rates_of_known_work(monkeypatch):
    one_second = bench.Timing(1.0, 1.0, 0.0, 10)
    monkeypatch.setattr(bench, "timed", lambda *_, **__: one_second)
    found = bench.ceilings(scale=0.125)
    # 2 × 4 bytes of 2^20 numbers; 2·256³; 2·9·64·64 for each of 32×32 pixels.
    assert found == (2**23, 2 * 256**3, 2 * 9 * 64 * 64 * 32 * 32)


def test_work_is_counted_by_hand():
    x, weight = torch.rand(1, 4, 10, 10), torch.rand(8, 4, 3, 3)
    found = bench.counted(lambda: F.conv2d(x, weight, padding=1))
    assert found == (2 * 9 * 4 * 8 * 100, 0, 4 * (400 + 800 + 8 * 4 * 9))
    y = torch.rand(10, 20)
    found = bench.counted(lambda: (y @ y.T).exp())
    assert found == (2 * 10 * 10 * 20, 2 * 10 * 10 * 20, 4 * (200 + 200 + 100 + 100 + 100))


def test_what_has_no_product_has_no_flops():
    x = torch.rand(6)
    assert bench.counted(lambda: x + 1) == (0, 0, 48)


def test_a_depth_wise_convolution_counts_one_channel_each():
    x, weight = torch.rand(1, 6, 10, 10), torch.rand(6, 1, 3, 3)
    with torch.inference_mode():
        found = bench.counted(lambda: F.conv2d(x, weight, padding=1, groups=6))
    assert found.flops == 2 * 9 * 6 * 100


def test_a_convolution_counts_the_same_with_what_follows_it_fused(monkeypatch):
    x, weight = torch.rand(1, 6, 10, 10), torch.rand(6, 1, 3, 3)

    def gated() -> torch.Tensor:
        return onednn.depthwise_times(x, weight, onednn.depthwise_gelu(x, weight))

    onednn._fuses()  # asks torch with a small picture, once
    with torch.inference_mode():
        fused = bench.counted(gated)
        monkeypatch.setattr(onednn, "_fuses", lambda: False)
        plain = bench.counted(gated)
    assert fused.flops == plain.flops == 2 * 2 * 9 * 6 * 100
    assert fused.bytes <= plain.bytes


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_a_convolution_that_is_called_by_its_library_s_name_counts():
    x, weight = torch.rand(1, 6, 10, 10), torch.rand(8, 3, 1, 1)
    with torch.inference_mode():
        found = bench.counted(
            lambda: torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), 2)
        )
    assert found == (2 * 3 * 8 * 100, 0, 4 * (600 + 800 + 24))


def test_tables_keep_each_other_and_are_replaced_by_name(tmp_path):
    path = tmp_path / "figures" / "performance.json"
    speed = pd.DataFrame({"model": ["caf", "refusion"], "seconds": [0.25, None]})
    bench.write_table(path, "speed", speed)
    bench.write_table(path, "memory", pd.DataFrame({"bytes": [1]}))
    bench.write_table(path, "memory", pd.DataFrame({"bytes": [2**40]}))
    found = bench.read_tables(path)
    assert list(found) == ["speed", "memory"]
    assert found["memory"]["bytes"].tolist() == [2**40]
    assert found["speed"]["seconds"].isna().tolist() == [False, True]
    assert found["speed"].attrs == {"machine": bench.machine(), "version": bench.version()}
    assert [p.name for p in path.parent.iterdir()] == ["performance.json"]


def test_a_table_that_is_put_elsewhere_keeps_its_version(tmp_path, monkeypatch):
    bench.write_table(tmp_path / "run.json", "speed", pd.DataFrame({"seconds": [1.0]}))
    measured = bench.version()
    monkeypatch.setattr(bench, "version", lambda: "later")
    bench.write_table(
        tmp_path / "kept.json", "speed", bench.read_tables(tmp_path / "run.json")["speed"]
    )
    assert bench.read_tables(tmp_path / "kept.json")["speed"].attrs["version"] == measured


def test_a_file_of_another_machine_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "performance.json"
    bench.write_table(path, "speed", pd.DataFrame({"seconds": [1.0]}))
    before = path.read_text()
    monkeypatch.setattr(bench, "machine", lambda device: {"name": "abacus"})
    with pytest.raises(ValueError, match=r"expected .*abacus"):
        bench.write_table(path, "speed", pd.DataFrame({"seconds": [2.0]}))
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"tables": {}})])
def test_a_file_that_is_none_of_ours_is_named(text, tmp_path):
    path = tmp_path / "performance.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected the JSON")):
        bench.read_tables(path)


def test_the_version_tells_changed_code_but_not_tables(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@y.z", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "figures").mkdir()
    code, table = tmp_path / "code.py", tmp_path / "figures" / "table.json"
    for path in (code, table):
        path.write_text("1")
    git("init")
    assert bench.version(tmp_path) == "unknown"  # no commit yet
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")[:7]
    table.write_text("2")
    (tmp_path / "new.txt").write_text("")
    assert bench.version(tmp_path) == commit
    code.write_text("2")
    assert bench.version(tmp_path) == f"{commit}-dirty"


def test_the_version_is_a_commit_or_the_package_s(monkeypatch, tmp_path):
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|\d+\.\d+\.\d+.*", bench.version())
    monkeypatch.setattr(bench.fusionkit, "__file__", str(tmp_path / "fusionkit" / "__init__.py"))
    assert bench.version() == bench.fusionkit.__version__
    assert bench.version(tmp_path) == "unknown"
