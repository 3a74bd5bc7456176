"""report.html: honest, complete, safe against what models write, and written also when half of a run is missing."""

import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from cluster.report import evaluation_table, write_report
from cluster.report.curves import MAX_POINTS, _thin
from cluster.report.run_files import Evaluation
from cluster.report.sentences import headline, number, sentence, warning
from contracts.config import ConfigError

HOSTILE = '</p><script>alert("x")</script><img src=https://evil.example/x onerror=alert(1)>{{ 7*7 }} \u202e \ud800'


class Page(HTMLParser):
    """What a browser would make of the page: elements with attributes, text, and the exact numbers."""

    def __init__(self, html):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.values: list[float] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split()).replace("\xa0", " ")

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "data":
            self.values.append(float(attributes["value"] or "nan"))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def _bounds(mean, low, high, n=64):
    return {"mean": mean, "low": low, "high": high, "n": n}


def _metric(name, role, before, after, low, high):
    return {
        "name": name,
        "role": role,
        "before": _bounds(before, before - 0.05, before + 0.05),
        "after": _bounds(after, after - 0.05, after + 0.05),
        "difference": _bounds(round(after - before, 6), low, high),
    }


PROXY_ROSE = _metric("reward/sentiment_model", "proxy", 0.1, 0.9, 0.61, 0.99)
GOLD_ROSE = _metric("vader", "gold", 0.28, 0.47, 0.03, 0.35)
GOLD_UNCLEAR = _metric("vader", "gold", 0.28, 0.31, -0.12, 0.18)
GOLD_FELL = _metric("vader", "gold", 0.28, 0.08, -0.33, -0.07)
KL = _metric("kl_to_reference", "kl", 0.0, 0.212, 0.174, 0.25)
LENGTH = _metric("response_tokens", "length", 33.0, 37.0, 0.9, 7.1)


def _evaluation(*metrics):
    return {
        "schema_version": 1,
        "num_prompts": 64,
        "weights_version_before": 0,
        "weights_version_after": 25,
        "metrics": list(metrics),
        "samples": [
            {
                "prompt_id": "p1",
                "prompt": "Say something kind. " + HOSTILE,
                "before": "No.",
                "after": HOSTILE,
                "scores_before": {"vader": -0.125},
                "scores_after": {"vader": 0.8125},
            }
        ],
    }


def test_held_out_rewards_are_drawn_over_kl_and_warned_of(run_dir):
    config = "rewards: [{name: sentiment_model}, {name: other, weight: 0}]\nwatch: {}\n"
    (run_dir / "config.yaml").write_text("output_dir: runs/quickstart\nsteps: 5\n" + config)
    rows = [_row(step) | {"reward/other": -0.5 * step, "watch/length_drift": 0.1 * step} for step in range(1, 6)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fell = _metric("reward/other", "held_out", 0.4, 0.1, -0.5, -0.1)
    (run_dir / "evaluation.json").write_text(json.dumps(_evaluation(PROXY_ROSE, fell)))
    page = Page(write_report(run_dir).read_text())
    labels = [svg["aria-label"] for svg in page.all("svg")]
    (over_kl,) = [label for label in labels if label.startswith("Reward over KL")]
    assert "trained on from 0.100 to 0.500" in over_kl
    assert "other from -0.500 to -2.50" in over_kl
    assert any(label.startswith("Watch: length from 0.100 to 0.500") for label in labels)
    assert "a held-out reward went down" in page.text
    assert "KL to reference, nats a response" in page.text


PREFERENCES = {
    "simulated": True,
    "pairs": 256,
    "votes": 1280,
    "dropped": {"tie": 12},
    "voters": {"careful-0": 0.91, "hostile-0": 0.14},
    "agreement_with_gold": 0.93,
    "reward_model": {
        "held_out_accuracy": _bounds(0.78, 0.66, 0.9, 51),
        "train_pairs": 205,
        "held_out_pairs": 51,
        "seconds": 83.5,
        "reward_version": 1,
    },
}


def _row(step):
    return {
        "step": step,
        "weights_version": step,
        "reward_mean": 0.1 * step,
        "reward/sentiment_model": 0.2 * step,
        "kl_to_reference": 0.01 * step,
        "entropy": 3 - 0.1 * step,
        "lag_steps_max": 1,
        "broadcast_bytes": 5,
        "broadcast_bytes_dense": 1000,
        "samples_per_s": 2.5,
        "step_s": 12.0,
        "gradient_norm": 0.7,
    }


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "quickstart"
    run.mkdir()
    (run / "config.yaml").write_text("output_dir: runs/quickstart\nsteps: 5\npreferences: {path: p.jsonl}\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(_row(step)) + "\n" for step in range(1, 6)))
    (run / "evaluation.json").write_text(json.dumps(_evaluation(PROXY_ROSE, GOLD_ROSE, KL, LENGTH)))
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0+cpu", "cpus": "2"}))
    (run / "preferences.json").write_text(json.dumps(PREFERENCES))
    reasons = ["score is not finite", "empty response", "score is not finite"]
    rows = [{"trajectory_id": str(i), "reason": reason} for i, reason in enumerate(reasons)]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def _page(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_a_whole_run(run_dir):
    page = _page(run_dir)
    assert "What is missing" not in page.text
    assert "rose by more than its confidence interval; the gold reward rose by more than its" in page.text
    assert "gold vader: rose, 0.28 → 0.47 (difference +0.19, 95 % interval 0.03 to 0.35, 64 prompts)" in page.text
    assert "The voters were simulated: no person voted in this run." in page.text
    assert "Dropped: tie 12." in page.text
    assert "picks the preferred response in 78 % of cases (95 % interval 66 % to 90 %" in page.text
    assert re.search(r"score is not finite 2 .*empty response 1", page.text)
    assert "torch 2.13.0+cpu" in page.text
    assert "preferences: {path: p.jsonl}" in page.text
    assert "steps 5 of 5 time in steps 1.0 min samples/s, median step 2.50 largest lag, steps 1" in page.text
    assert sorted(path.name for path in run_dir.iterdir() if path.name.startswith((".", "report"))) == ["report.html"]


def test_the_exact_numbers_are_in_the_page(run_dir):
    values = _page(run_dir).values
    for metric in (PROXY_ROSE, GOLD_ROSE, KL, LENGTH):
        for part in ("before", "after", "difference"):
            expected = [metric[part][key] for key in ("mean", "low", "high")]
            at = [values[i : i + 3] for i in range(len(values) - 2)]
            assert expected in at, (metric["name"], part)
    for exact in (-0.125, 0.8125, 0.93, 0.91, 0.14, 0.1, 0.5, 0.2, 1.0):  # scores, voters, first and last of curves
        assert exact in values


def test_model_output_is_text_and_nothing_else(run_dir):
    (run_dir / "quarantine.jsonl").write_text(json.dumps({"trajectory_id": "1", "reason": HOSTILE}) + "\n")
    (run_dir / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run_dir / "events.jsonl").write_text(json.dumps({"time": 1795380000.5, "event": HOSTILE, "cause": HOSTILE}) + "\n")
    row = {**_row(6), f"x{HOSTILE}": 1.0, "reward/<b>$\\frac": 1.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    page = _page(run_dir)
    assert not page.all("script")
    assert not page.all("img")
    assert all(not attributes for attributes in page.all("b"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count('<script>alert("x")</script>') >= 6  # shown as written
    assert "{{ 7*7 }}" in page.text
    assert "2026-11-22" in page.text


def test_what_happened_is_a_table_without_the_ordinary(run_dir):
    def event(kind, after_s, who="rollout-0", **more):
        return {"time": 1795380000 + after_s, "event": kind, "who": who, "step": 2, "schema_version": 1, **more}

    events = [
        event("start", 0, "the run"),
        *(event("rollover", 10 + version, cause="delta") for version in range(1234)),
        *(event("quarantine", 20, f"t{n}", cause="empty" if n % 3 else "nan") for n in range(6)),
        event("death", 125, cause="The actor died", consequence="another is started", node="10.0.0.7"),
        event("quarantine", 130, "t9", cause="nan"),
        event("start_failed", 140, "rollout-1"),
    ]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    text = _page(run_dir).text
    assert "What happened: 5 events" in text
    assert "Of 1,234 rollover, 7 quarantine, 1 start, 1 death, 1 start failed" in text
    assert re.search(r"0 s 2026-\S+ \S+ UTC 2 start the run", text)
    assert re.search(r"20 s \S+ \S+ UTC 2 quarantine 6 trajectories 4 times: empty", text)
    assert re.search(r"2 min 05 s \S+ \S+ UTC 2 death rollout-0 on 10\.0\.0\.7 The actor died another is started", text)
    assert re.search(r"2 quarantine t9 nan", text)
    assert "rollover rollout-0" not in text


def test_nothing_is_fetched(run_dir):
    page = _page(run_dir)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_accessible(run_dir):
    page = _page(run_dir)
    plots = page.all("svg")
    labels = [plot["aria-label"] for plot in plots]
    assert [label.split(":")[0] for label in labels] == [
        "Reward", "KL to reference", "Entropy", "Staleness", "Step time", "Throughput", "Broadcast size",
        "broadcast_bytes", "gradient_norm",
    ]  # fmt: skip
    assert all(plot["role"] == "img" for plot in plots)
    assert "KL to reference: KL from 0.0100 to 0.0500, lowest 0.0100, highest 0.0500." in labels
    assert page.all("html")[0]["lang"] == "en"
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert any(attributes.get("name") == "viewport" for attributes in page.all("meta"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    known = {f"#{name}" for name in ids}
    assert {attributes["xlink:href"] for attributes in page.all("use")} <= known


@pytest.mark.parametrize(
    ("metrics", "said", "warned"),
    [
        ((PROXY_ROSE, GOLD_ROSE), "the gold reward rose by more than its confidence interval", ""),
        (
            (PROXY_ROSE, GOLD_UNCLEAR),
            "the gold reward did not rise by more than its confidence interval",
            "without gold",
        ),
        ((PROXY_ROSE, GOLD_FELL), "the gold reward fell by more than its confidence interval", "over-optimisation"),
        ((PROXY_ROSE,), "no gold judge was asked", ""),
        ((GOLD_ROSE,), "No proxy reward was measured", ""),
        (
            (GOLD_ROSE, GOLD_FELL, GOLD_UNCLEAR),
            "1 of 3 gold rewards rose by more than their confidence intervals and 1",
            "",
        ),
    ],
)
def test_the_headline_is_honest(metrics, said, warned):
    evaluation = Evaluation.model_validate(_evaluation(*metrics))
    assert said in headline(evaluation)
    assert warned in warning(evaluation)
    assert bool(warned) == bool(warning(evaluation))


def test_no_rise_is_said_in_the_page(run_dir):
    flat = _metric("reward/sentiment_model", "proxy", 0.1, 0.14, -0.02, 0.1)
    (run_dir / "evaluation.json").write_text(json.dumps(_evaluation(flat, GOLD_UNCLEAR)))
    text = _page(run_dir).text
    assert "The proxy reward did not rise by more than its confidence interval; the gold reward did not rise" in text
    assert "gold vader: no clear change, 0.28 → 0.31 (difference +0.03, 95 % interval -0.12 to 0.18" in text
    assert not re.search(r"\brose\b", text)  # the note explains “Rose”, nothing else says it


def test_one_prompt_decides_nothing():
    metric = _metric("vader", "gold", 0.1, 0.9, None, None)
    evaluation = Evaluation.model_validate(_evaluation(metric))
    assert "did not rise" in headline(evaluation)
    assert "too few prompts to tell" in sentence(evaluation.metrics[0])


def test_an_interrupted_run_still_has_a_report(run_dir):
    for name in ("evaluation.json", "environment.json", "preferences.json", "quarantine.jsonl"):
        (run_dir / name).unlink()
    torn = (json.dumps(_row(1)) + "\n" + json.dumps(_row(2)) + '\n{"step": 3, "é').encode()[:-1]
    (run_dir / "metrics.jsonl").write_bytes(torn)  # in the middle of a character
    text = _page(run_dir).text
    assert "Whether the policy got better is not known" in text
    assert "The run has finished 2 of 5 steps." in text
    assert "metrics.jsonl: 1 unreadable line left out" in text
    for name in ("evaluation.json", "environment.json", "preferences.json"):
        assert f"{name} is missing" in text
    assert "No response was quarantined." in text


def test_only_a_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 5\n")
    page = _page(tmp_path)
    assert "metrics.jsonl is missing: there are no curves." in page.text
    assert "preferences.json" not in page.text  # none was asked for
    assert not page.all("svg")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"schema_version": 2}', json.dumps({**_evaluation(), "metrics": [{"name": "x", "role": "gold"}]})],
)
def test_a_broken_evaluation_is_named_and_does_not_stop_the_page(run_dir, text):
    (run_dir / "evaluation.json").write_text(text)
    page = _page(run_dir)
    assert re.search(r"evaluation.json (cannot be read|is not valid JSON) \(.*no comparison", page.text)
    assert page.all("svg")


def test_not_a_run_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="a mapping of keys"):
        write_report(tmp_path)


def test_odd_values_in_metrics(run_dir):
    rows = [
        {**_row(2), "entropy": float("nan"), "note": "text", "flag": True},
        _row(1),
        {**_row(1), "entropy": 2.5},
        {},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = [plot["aria-label"] for plot in _page(run_dir).all("svg")]
    assert "Entropy: entropy from 2.50 to 2.50, lowest 2.50, highest 2.50." in labels
    assert not any(label.startswith(("note", "flag")) for label in labels)


def test_long_runs_keep_their_spikes():
    points = [(float(step), 0.0) for step in range(50_000)]
    points[31_234] = (31_234.0, 9.0)
    points[77] = (77.0, -4.0)
    thinned = _thin(points)
    assert len(thinned) <= MAX_POINTS
    assert {(31_234.0, 9.0), (77.0, -4.0)} <= set(thinned)
    assert thinned == sorted(thinned)


def test_the_terminal_table():
    console = Console(width=120, record=True, file=None, color_system=None)
    with console.capture() as capture:
        console.print(evaluation_table(_evaluation(PROXY_ROSE, GOLD_UNCLEAR, {**KL, "name": "[red]kl"})))
    text = capture.get()
    assert "64 held-out prompts, weights 0 → 25" in text
    assert re.search(r"vader \(gold\).*0\.28.*0\.31.*\+0\.03.*-0\.12 to 0\.18.*no clear change", text)
    assert re.search(r"reward/sentiment_model \(proxy\).*rose", text)
    assert "[red]kl (kl)" in text
    with pytest.raises(ValueError, match="schema_version"):
        evaluation_table({**_evaluation(), "schema_version": 2})


def test_numbers():
    assert [number(x) for x in (0, 1, 25.0, 0.4567, 3.14159, 1234.5, 0.00123, 3.2e-6, -0.0)] == [
        "0", "1", "25", "0.457", "3.14", "1,234", "0.00123", "3.20e-06", "0",
    ]  # fmt: skip
    assert number(0.19, width=0.16, sign=True) == "+0.19"
    assert number(-0.001, width=0.16) == "0.00"
    assert number(37.04, width=3.1) == "37.0"
    assert number(float("inf"), width=None) == "unbounded"
