"""Metrics of real jobs: the textfile, a page that a real Prometheus scrapes, the alert rules and the dashboard."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoints import add_tokenizer, make_pico_r1
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

import dsquant
from dsquant.cli import main
from dsquant.errors import InputError, UsageError
from dsquant.reporting.progress import Limits, Progress, silent
from dsquant.reporting.prometheus import monitored

DOCS = Path(__file__).parents[2] / "docs" / "monitoring"
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="apt-get install prometheus")


def samples(path: Path) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(path.read_text())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def job(text: Path, output: Path, *more: str) -> list[str]:
    options = ["--samples", "6", "--seq-len", "32", "--group-size", "64", "--no-evaluate", "--json", *more]
    run = [sys.executable, "-c", "from dsquant.cli import main; main()", "awq"]
    return [*run, "--output", str(output), "--calibration", str(text), *options]


def test_a_peak_of_memory_does_not_begin_with_that_of_the_process_that_started_the_job() -> None:
    code = "from dsquant.reporting.progress import peak_resident_bytes as peak; print(peak())"
    ballast = b"1" * 2**29
    told = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert told < len(ballast) / 4


def test_a_jobs_textfile_tells_all_there_is_to_tell(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "dsquant.prom"
    dsquant.awq(
        nano_r1, output=tmp_path / "out", calibration=(str(text_file),), samples=6, seq_len=32, group_size=64,
        evaluate=False, progress=False, metrics_file=file,
    )  # fmt: skip
    found = samples(file)
    assert found["dsquant_running",] == 0
    assert found["dsquant_layers_done",] == found["dsquant_layers",] == 5
    assert found["dsquant_tensors_done",] == found["dsquant_tensors",] > 50
    assert found["dsquant_tokens_total",] == 2 * 6 * 32
    assert found["dsquant_read_bytes_total",] > found["dsquant_written_bytes_total",] > 1e6
    assert found["dsquant_stage_seconds_total", "quantize"] > 0
    assert found["dsquant_stage_done_ratio", "hash"] == 1
    assert 0 < found["dsquant_loss_after_ratio", "0", "1", "mlp"] <= found["dsquant_loss_before_ratio", "0", "1", "mlp"]
    assert 0 < found["dsquant_experts_undercovered",] <= found["dsquant_experts",] == 4
    assert found["dsquant_memory_used_bytes", "host"] < found["dsquant_memory_budget_bytes", "host"]
    assert found["dsquant_disk_needed_bytes",] == 0 < found["dsquant_disk_free_bytes",]
    assert abs(time.time() - found["dsquant_last_success_timestamp_seconds",]) < 600


def test_a_failing_job_keeps_the_time_of_the_last_success(tmp_path: Path) -> None:
    file = tmp_path / "dsquant.prom"
    with monitored(silent, file) as report:
        report(Progress("scan", 1, 2, "", limits=Limits(tmp_path / "out", 10, 1000)))
    before = samples(file)["dsquant_last_success_timestamp_seconds",]
    with pytest.raises(InputError, match="no such"), monitored(silent, file) as report:
        report(Progress("evaluate", 1, 2, "", gates={"mean_kl": False, "perplexity": True}))
        raise InputError("no such model")
    after = samples(file)
    assert after["dsquant_last_success_timestamp_seconds",] == before
    assert (after["dsquant_gate_passed", "mean_kl"], after["dsquant_gate_passed", "perplexity"]) == (0, 1)
    assert after["dsquant_running",] == 0
    with monitored(silent, file):  # a finished recipe: nothing to do is a success
        pass
    again = samples(file)
    assert again["dsquant_last_success_timestamp_seconds",] > before and again["dsquant_gate_passed", "mean_kl"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dsquant.prom"]


def test_a_file_or_port_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.prom"), monitored(silent, tmp_path / "metrics.txt"):
        pass
    with pytest.raises(InputError, match="missing"), monitored(silent, tmp_path / "no" / "a.prom"):
        pass
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="another port"), monitored(silent, None, port):
            pass
    for address in ("", "\0", "no.such.host.invalid", "x" * 70 + ".y", "192.0.2.1"):
        with pytest.raises(UsageError, match="address of this machine"), monitored(silent, None, free_port(), address):
            pass
    with pytest.raises(UsageError, match="nothing without"), monitored(silent, None, None, "127.0.0.1"):
        pass


def test_the_page_is_this_machines_alone_until_an_address_opens_it() -> None:
    for address, listening in ((None, "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0")):
        with monitored(silent, None, port := free_port(), address):
            found = [one.laddr.ip for one in psutil.Process().net_connections("tcp") if one.laddr.port == port]
            assert found == [listening] and "dsquant_running 1.0" in scraped(port)


@promtool
def test_promtool_accepts_the_rules_and_proves_every_alert() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        answer = subprocess.run(["promtool", *command], cwd=DOCS, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    rules = (DOCS / "alerts.yml").read_text()
    assert set(re.findall(r"alert: (\w+)", rules)) == set(
        re.findall(r"alertname: (\w+)", (DOCS / "alerts_test.yml").read_text())
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="apt-get install prometheus")
def test_a_real_prometheus_scrapes_a_real_run_and_answers_the_dashboard(text_file: Path, tmp_path: Path) -> None:
    port, page = free_port(), free_port()
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
        "scrape_configs": [{"job_name": "dsquant", "static_configs": [{"targets": [f"localhost:{page}"]}]}],
        "rule_files": [str(DOCS / "alerts.yml")],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    options = [f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    server = subprocess.Popen(
        ["prometheus", *options, f"--web.listen-address=localhost:{port}"], stderr=subprocess.DEVNULL
    )
    try:
        model = add_tokenizer(make_pico_r1(tmp_path / "model"))
        command = job(text_file, tmp_path / "out", "--metrics-port", str(page))
        last_page = ""
        with (tmp_path / "log").open("w") as log:
            running = subprocess.Popen([*command, str(model)], stdout=log, stderr=log)
            while running.poll() is None:
                last_page = scraped(page) or last_page
                time.sleep(0.1)
        assert running.returncode == 0, (tmp_path / "log").read_text()
        if shutil.which("promtool"):
            lint = subprocess.run(["promtool", "check", "metrics"], input=last_page, capture_output=True, text=True)
            assert lint.returncode == 0, lint.stdout + lint.stderr
        assert query(port, "max_over_time(dsquant_layers[10m])") == [8]
        assert query(port, "max_over_time(dsquant_layers_done[10m])")[0] > 1
        assert query(port, "max_over_time(dsquant_running[10m])") == [1]
        dashboard = json.loads((DOCS / "dashboard.json").read_text())
        expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        for expression in expressions:
            query(port, expression.replace("$instance", ".*"))
        used = set(re.findall(r"dsquant_\w+", " ".join(expressions) + (DOCS / "alerts.yml").read_text()))
        told = set(re.findall(r"^(dsquant_\w+)", last_page, re.MULTILINE))
        assert used - told <= {"dsquant_gate_passed", "dsquant_last_success_timestamp_seconds"}
        assert set(re.findall(r"`(dsquant_\w+)`", (DOCS / "README.md").read_text())) >= used | told
        alerts = json.loads(get(port, "/api/v1/rules"))["data"]["groups"][0]["rules"]
        assert len(alerts) == 4 and all(rule["health"] == "ok" for rule in alerts)
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def scraped(port: int) -> str:
    try:
        return get(port, "/metrics")
    except OSError:
        return ""


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://localhost:{port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def query(port: int, expression: str) -> list[float]:
    answer: dict[str, Any] = json.loads(get(port, "/api/v1/query?" + urllib.parse.urlencode({"query": expression})))
    assert answer["status"] == "success", answer
    return [float(found["value"][1]) for found in answer["data"]["result"]]


def test_a_recipes_run_tells_its_gates(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(nano_r1),
        "output": str(tmp_path / "out"),
        "calibration": {"texts": [str(text_file)], "samples": 4, "seq_len": 32},
        "quantize": [{"name": "awq", "to": ["awq"], "steps": "none", "group_size": 64}],
        "evaluate": {"texts": [str(text_file)], "samples": 4, "seq_len": 32},
        "gates": {"gates": [{"metric": "mean_kl", "at_most": 1e-9}]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    file = tmp_path / "dsquant.prom"
    failed = CliRunner().invoke(main, ["run", str(tmp_path / "recipe.yaml"), "--metrics-file", str(file), "--json"])
    assert failed.exit_code == 4, failed.output
    found = samples(file)
    passed = {key: value for key, value in found.items() if key[0] == "dsquant_gate_passed"}
    assert list(passed.values()) == [0] and "mean_kl" in next(iter(passed))[1]
    assert ("dsquant_last_success_timestamp_seconds",) not in found
