"""One page from the results: what the method claims, what was measured, and whether the data bear it out."""

from __future__ import annotations

import functools
import html
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.claims.train import read
from benchmarks.claims.variants import VARIANTS
from training.config import ModelConfig

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "claims",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
)
from matplotlib import pyplot as plt  # noqa: E402

STUDENT_T = {
    1: 12.71,
    2: 4.30,
    3: 3.18,
    4: 2.776,
    5: 2.571,
    6: 2.45,
    7: 2.36,
    8: 2.31,
    9: 2.26,
}  # 97.5 %, by degrees of freedom
SETS = {
    "simulated": "simulated, lasting tastes",
    "drifting": "simulated, tastes that change",
    "kuairand": "KuaiRand rows",
    "movielens": "MovieLens small",
    "buildroot": "git log of Buildroot",
}

Claim = tuple[str, str, str]  # what is claimed, what was measured, the verdict


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and half of its 95 % interval over `runs` runs (Student's t)."""

    mean: float
    half: float
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}" if self.runs > 1 else f"{self.mean:+.4f} (one run)"

    @property
    def above(self) -> bool:
        return self.runs > 1 and self.mean - self.half > 0

    @property
    def below(self) -> bool:
        return self.runs > 1 and self.mean + self.half < 0


class Results:
    """Trainings by (data set, variant), and what else was measured."""

    def __init__(self, folder: Path) -> None:
        self.trainings = read(folder / "trainings.jsonl")
        self.by: dict[tuple[str, str], dict[int, dict]] = defaultdict(dict)
        for run in self.trainings:
            self.by[run["data_set"], run["variant"]][run["number"]] = run
        self.latency = _loaded(folder / "latency.json")
        self.memory = _loaded(folder / "memory.json")

    def runs(self, data_set: str, variant: str) -> list[dict]:
        return [run for _, run in sorted(self.by[data_set, variant].items()) if "auc" in run]

    def mean(self, data_set: str, variant: str, name: str) -> float:
        values = [run[name] for run in self.runs(data_set, variant) if name in run]
        return float(np.mean(values)) if values else math.nan

    def difference(self, data_set: str, variant: str, base: str = "exact", name: str = "auc") -> Difference | None:
        """Return variant minus base, paired by seed (and by partition of the simulated sets)."""
        ours, theirs = self.by[data_set, variant], self.by[data_set, base]
        both = [n for n in ours if n in theirs and name in ours[n] and name in theirs[n]]
        return interval([ours[n][name] - theirs[n][name] for n in both]) if both else None


def interval(values: Sequence[float]) -> Difference:
    half = (
        STUDENT_T.get(len(values) - 1, 1.96) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        if len(values) > 1
        else math.nan
    )
    return Difference(float(np.mean(values)), half, len(values))


def write_page(results: Path, out: Path) -> Path:
    """Write OUT/index.html: no scripts, nothing from elsewhere."""
    found = Results(results)
    sections = [
        make(found)
        for make in (_accuracy, _codebooks, _length, _kernels, _context, _failures, _refined, _memory, _choices)
    ]
    out.mkdir(parents=True, exist_ok=True)
    page = out / "index.html"
    page.write_text(
        PAGE.format(about=_about(found), verdicts=_verdicts(found), sections="\n".join(sections)), encoding="utf-8"
    )
    return page


# ---- verdicts --------------------------------------------------------------------------------------------------------


def _verdicts(r: Results) -> str:
    """Return a row of the table for each claim of which something was measured."""
    rows = []
    for claims in (_on_exact_attention, _on_other_kinds, _on_length, _on_parts, _on_context, _on_cost):
        for claim, measured, verdict in claims(r):
            kind = {"holds": "good", "fails": "bad"}.get(verdict.split(":")[0].split(",")[0], "open")
            rows.append(f'<tr><td>{claim}</td><td>{measured}</td><td class="{kind}">{verdict}</td></tr>')
    return "\n".join(rows)


def _decided(difference: Difference) -> str:
    """Return the verdict on a claim that something is better, by the interval of its difference."""
    return "holds" if difference.above else "fails" if difference.below else "not decided"


def _on_exact_attention(r: Results) -> Iterator[Claim]:
    vql, refined = r.difference("simulated", "vql"), r.difference("simulated", "vql_refined_64")
    if not vql or not refined:
        return
    yield (
        "Plain VQL is within .010 AUC of exact softmax attention with the same head",
        f"{vql} (simulated)",
        "holds" if vql.mean - vql.half > -0.010 else "fails",
    )
    yield (
        "Refined VQL is within .003 of exact attention, or above it",
        f"{refined} (simulated)",
        "holds" if refined.mean - refined.half > -0.003 else "fails",
    )
    gain = r.difference("simulated", "vql_refined_64", "vql")
    yield (
        "Refining the 64 heaviest events improves plain VQL at 64 codes",
        f"{gain}",
        "holds" if gain and gain.above else "not seen: what it would recover is not lost here",
    )
    small = r.difference("simulated", "vql_16_codes_refined_64", "vql_16_codes")
    if small:
        yield (
            "Refining improves VQL whose codebook is too small (16 codes)",
            f"{small}",
            "holds" if small.above else "not decided",
        )


def _on_other_kinds(r: Results) -> Iterator[Claim]:
    for other in ("recent_200", "sdim", "mean_pooling"):
        if ours := r.difference("simulated", "vql", other):
            yield f"VQL beats {_name(other)}", f"{ours} (simulated)", _decided(ours)
    for data_set in ("kuairand", "movielens", "buildroot"):
        if ours := r.difference(data_set, "vql", "mean_pooling"):
            yield (
                f"VQL beats mean pooling on {SETS[data_set]}",
                f"{ours}; intervals are over seeds of one small set",
                _decided(ours),
            )


def _on_length(r: Results) -> Iterator[Claim]:
    lengths = [by for run in r.runs("simulated", "vql") if (by := run.get("by_length"))]
    if not lengths:
        return
    first, last = (np.mean([by[i]["error"] for by in lengths]) for i in (1, -1))
    yield (
        "The error of attention does not grow with the length of the history",
        f"L1 {first:.3f} at 1,000 events, {last:.3f} at 100,000",
        "holds" if last < 1.15 * first else "fails",
    )
    yield (
        "The bound of the theorem is never exceeded",
        f"{sum(len(by) for by in lengths)} sets of histories",
        "holds" if all(row["holds"] for by in lengths for row in by) else "fails",
    )


def _on_parts(r: Results) -> Iterator[Claim]:
    if groups := r.difference("simulated", "vql", "vql_1_groups_64_codes"):
        claim = "Groups of heads lower the error at the same cache size (4 groups against 1)"
        yield claim, f"AUC {groups}", _decided(groups)
    for a, b, claim in (
        ("vql", "vql_no_kernel", "A kernel inside the softmax helps where tastes change"),
        ("vql", "vql_kernel_outside", "Inside the softmax is better than outside"),
        ("vql", "vql_1_exponential", "A mixture is better than one exponential"),
    ):
        if ours := r.difference("drifting", a, b):
            yield claim, f"{ours} (tastes that change)", _decided(ours)


def _on_context(r: Results) -> Iterator[Claim]:
    worst = [
        (how, ours)
        for how in ("missing", "shuffled")
        for share in (25, 50, 100)
        if (ours := r.difference("simulated", f"vql_{how}_{share}", f"exact_{how}_{share}"))
    ]
    if worst:
        how, ours = min(worst, key=lambda pair: pair[1].mean)
        yield (
            "Missing or wrong context costs VQL no more than it costs exact attention",
            f"at worst {ours} against exact attention ({how})",
            "holds" if not ours.below else f"fails: where all of it is {how}",
        )


def _on_cost(r: Results) -> Iterator[Claim]:
    if r.latency:
        first, last = r.latency["rows"][0], r.latency["rows"][-1]
        yield (
            "Scoring from caches does not depend on the length",
            f"{first['vql']:.1f} ms at {first['length']:,} events, {last['vql']:.1f} ms at {last['length']:,}; exact"
            f" {first['exact']:.0f} and {last['exact']:,.0f} ms",
            "holds" if last["vql"] < 2 * first["vql"] else "fails",
        )


# ---- sections --------------------------------------------------------------------------------------------------------


def _accuracy(r: Results) -> str:
    parts = []
    for data_set, title in SETS.items():
        names = [name for name in VARIANTS if r.runs(data_set, name) and not re.search("missing|shuffled", name)]
        rows = []
        for name in sorted(names, key=lambda n: -r.mean(data_set, n, "auc")):
            difference = r.difference(data_set, name)
            rows.append(
                [
                    _name(name),
                    f"{r.mean(data_set, name, 'auc'):.4f}",
                    "" if name == "exact" else _shown(difference),
                    f"{r.mean(data_set, name, 'gauc'):.4f}",
                    f"{r.mean(data_set, name, 'logloss'):.4f}",
                    str(len(r.runs(data_set, name))),
                ]
            )
        if rows:
            targets = r.runs(data_set, names[0])[0][
                "targets"
            ]  # the partition is the data set's: the same of every model
            parts.append(
                f"<details{' open' if data_set == 'simulated' else ''}><summary>{title} ({targets:,} evaluation"
                " targets)</summary>"
                + _table(["model", "AUC", "minus exact, 95 %", "GAUC", "log loss", "runs"], rows)
                + "</details>"
            )
    return _section(
        "Accuracy",
        "Every model on every data set, best epoch by the early stop. Differences are paired by seed; the simulated"
        " sets also change their partition with the seed, the real ones do not: there, an interval says nothing of"
        " another sample of users.",
        *parts,
    )


def _codebooks(r: Results) -> str:
    text = (
        "Compression is of the user's cache (sparse, fp16 means, two kernel components) against fp16 keys and values of"
        " the history; here histories have about 490 events; a cache has at most one entry a code, head and component,"
        " so at 10,000 events the same cache compresses twenty times more."
    )
    figure = _figure(functools.partial(_draw_codebooks, r), 3)
    return _section("Codebook size, groups, compression", text, figure, _codebook_table(r))


def _draw_codebooks(r: Results, axes) -> None:
    """Draw, by codes a group: AUC of every data set, the errors, and AUC by the size of the cache."""
    codes = {c: "vql" if c == 64 else f"vql_{c}_codes" for c in (4, 8, 16, 32, 64, 128, 256, 512)}
    for data_set in SETS:
        known = [(c, d) for c, name in codes.items() if (d := r.difference(data_set, name))]
        if len(known) > 1:
            _errorbars(axes[0], known, SETS[data_set])
    axes[0].axhline(0, color="0.6", lw=0.8)
    axes[0].set(xscale="log", xlabel="codes a group (4 groups)", ylabel="AUC minus exact attention")
    _legend(axes[0])
    for field, label in (("key_error", "key error / key variance"), ("attention_error", "L1 error of the weights")):
        errors = [r.mean("simulated", name, field) for name in codes.values()]
        axes[1].plot(list(codes), errors, marker="o", ms=3, label=label)
    axes[1].set(xscale="log", xlabel="codes a group", ylabel="mean over users")
    _legend(axes[1])
    auc, ratio = [], []
    for c, name in codes.items():
        difference = r.difference("simulated", name)
        auc.append(difference.mean if difference else math.nan)
        ratio.append(r.mean("simulated", name, "cache_bytes") / r.mean("simulated", name, "key_value_bytes"))
        if difference and not math.isnan(ratio[-1]):
            place = {"xytext": (3, -9), "textcoords": "offset points"}
            axes[2].annotate(f"{c}", (ratio[-1], difference.mean), fontsize=7, **place)
    axes[2].plot(ratio, auc, marker="o", ms=3)
    axes[2].set(xscale="log", xlabel="cache bytes / bytes of fp16 keys and values", ylabel="AUC minus exact attention")


def _codebook_table(r: Results) -> str:
    head = "model,groups,codes,AUC minus exact,key error,L1 error,perplexity / C,KiB a user,compression".split(",")
    rows = []
    for name in [n for n in VARIANTS if re.fullmatch(r"vql|vql_\d+_codes|vql_\d_groups_\d+_codes|vql_uneven_codes", n)]:
        if r.runs("simulated", name):
            model = VARIANTS[name].model
            compression = r.mean("simulated", name, "key_value_bytes") / r.mean("simulated", name, "cache_bytes")
            rows.append(
                [
                    _name(name),
                    str(model.groups),
                    str(model.codes),
                    _shown(r.difference("simulated", name)),
                    f"{r.mean('simulated', name, 'key_error'):.3f}",
                    f"{r.mean('simulated', name, 'attention_error'):.3f}",
                    f"{r.mean('simulated', name, 'perplexity'):.2f}",
                    f"{r.mean('simulated', name, 'cache_bytes') / 1024:.1f}",
                    f"{compression:.1f}",
                ]
            )
    return _table(head, rows)


def _length(r: Results) -> str:
    variants = {"vql_16_codes": "16 codes", "vql": "64 codes", "vql_256_codes": "256 codes"}

    def curve(
        name: str, field: str, key: str = "by_length", x: str = "length"
    ) -> tuple[list[float], list[float], list[float]]:
        tables = [run[key] for run in r.runs("simulated", name) if key in run]
        if not tables:
            return [], [], []
        values = np.array([[row[field] for row in table] for table in tables])
        return (
            [row[x] for row in tables[0]],
            values.mean(0).tolist(),
            (values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]).tolist(),
        )

    def draw(axes) -> None:
        for name, label in variants.items():
            x, y, sd = curve(name, "error")
            axes[0].errorbar(x, y, sd, marker="o", ms=3, capsize=2, label=f"VQL, {label}")
        x, y, _ = curve("vql", "top_100_error")
        axes[0].plot(x, y, "k--", lw=1, label="top 100 events, renormalised")
        axes[0].set(xscale="log", xlabel="events", ylabel="L1 error of the weights (at most 2)", ylim=(0, 2.05))
        _legend(axes[0])
        for field, label in (
            ("error", "measured"),
            ("bound", "2 tanh(Delta / 4)"),
            ("half_delta", "Delta / 2"),
            ("cauchy", "||q|| eps"),
        ):
            x, y, _ = curve("vql", field)
            axes[1].plot(x, y, marker="o", ms=3, label=label)
        axes[1].set(xscale="log", yscale="log", xlabel="events", ylabel="64 codes")
        _legend(axes[1])
        x, y, sd = curve("vql", "error", "heavy_tails")
        axes[2].errorbar(x, y, sd, marker="o", ms=3, capsize=2, label="error, heavy-tailed keys")
        x, y, _ = curve("vql", "eps_max", "heavy_tails")
        twin = axes[2].twinx()
        twin.plot(x, y, "C3--", lw=1, label="largest key error")
        twin.set(yscale="log", ylabel="largest key error (dashed)")
        axes[2].set(xscale="log", xlabel="events", ylabel="L1 error of the weights", ylim=(0, 2.05))
        _legend(axes[2])

    text = (
        "Histories drawn by the items' popularity, keys and codebooks of the trained models. With a fixed codebook and"
        " bounded keys the error is flat in the length while a top-100 retrieval loses nearly all of the mass; with"
        " keys of heavy-tailed lengths (Student's t, 3 degrees) the largest key error grows with the length and the"
        " error with it: keys are normalised for this reason."
    )
    return _section("Error against length", text, _figure(draw, 3))


def _kernels(r: Results) -> str:
    names = [
        "vql_no_kernel",
        "vql_1_exponential",
        "vql",
        "vql_3_exponentials",
        "vql_periodic_kernel",
        "vql_rank_kernel",
        "vql_kernel_outside",
        "exact_no_kernel",
        "exact",
    ]
    rows = [
        [
            _name(n),
            *[str(d) if (d := r.difference(s, n, "vql_no_kernel")) and n != "vql_no_kernel" else "" for s in SETS],
        ]
        for n in names
    ]
    text = (
        "AUC minus VQL without a kernel. Lasting tastes are no test of a kernel; where a taste is drawn anew every four"
        " days on average, it is worth more than anything else on this page. There one exponential, which cannot see"
        " the query's time, beats the mixture, and a kernel outside the softmax gains less than half."
    )
    return _section("Temporal kernels", text, _table(["model", *SETS.values()], rows))


def _context(r: Results) -> str:
    def draw(axes) -> None:
        for ax, how in zip(axes, ("missing", "shuffled"), strict=True):
            for name, label in (("exact", "exact attention"), ("vql", "VQL, 64 codes")):
                known = (
                    [(0, interval([run["auc"] for run in r.runs("simulated", name)]))]
                    if r.runs("simulated", name)
                    else []
                )
                known += [
                    (s, interval([run["auc"] for run in runs]))
                    for s in (25, 50, 100)
                    if (runs := r.runs("simulated", f"{name}_{how}_{s}"))
                ]
                _errorbars(ax, known, label)
            ax.set(xlabel=f"items whose static fields are {how} (%)", ylabel="AUC")
            _legend(ax)

    rows = [
        [
            how,
            f"{share} %",
            *[f"{r.mean('simulated', f'{n}_{how}_{share}', 'auc'):.4f}" for n in ("exact", "vql")],
            _shown(r.difference("simulated", f"vql_{how}_{share}", f"exact_{how}_{share}")),
        ]
        for how in ("missing", "shuffled")
        for share in (25, 50, 100)
    ]
    text = (
        "All static fields of a share of the items (author, tags, durations, kinds) are emptied, or given those of"
        " other such items, in training and scoring alike; the item's own id stays. Wrong context is worse than none."
        " VQL and exact attention lose alike until nothing is left: then keys come from ids alone and too few of them"
        " are seen often enough for a codebook to follow."
    )
    return _section(
        "Context injection",
        text,
        _figure(draw, 2),
        _table(["context", "of the items", "exact", "VQL", "VQL minus exact"], rows),
    )


def _failures(r: Results) -> str:
    named = {
        "vql_careless_start": "collapse: codewords far from the keys at the start, never revived",
        "vql_4_codes": "far too few codes",
        "vql_16_codes": "too few codes",
        "vql_sharp_queries": "logits four times as large, no cap",
        "vql_unbounded_keys": "queries and keys not normalised",
        "vql_warmup_20": "codebooks started after 20 steps, from keys that know nothing",
        "vql": "nothing wrong",
    }
    rows = []
    for name, what in named.items():
        runs = r.runs("simulated", name)
        if runs:
            said = sorted({re.sub(r"[\d.]+", "…", warning) for run in runs for warning in run.get("warnings", [])})
            warned = sum(bool(run.get("warnings")) for run in runs)
            rows.append(
                [
                    what,
                    _shown(r.difference("simulated", name)),
                    f"{r.mean('simulated', name, 'perplexity'):.2f}",
                    f"{r.mean('simulated', name, 'dead'):.2f}",
                    f"{r.mean('simulated', name, 'key_error'):.3f}",
                    f"{r.mean('simulated', name, 'attention_error'):.2f} of {r.mean('simulated', name, 'bound'):.2f}",
                    f"{warned} of {len(runs)}: {'; '.join(said)}" if said else "none",
                ]
            )
    scales = [run["by_scale"] for run in r.runs("simulated", "vql") if "by_scale" in run]
    tables = [
        _table(
            [
                "what goes wrong",
                "AUC minus exact",
                "perplexity / C",
                "dead codes",
                "key error",
                "L1 error of bound",
                "runs warned in training",
            ],
            rows,
        )
    ]
    if scales:
        cells = [
            [
                f"x {row['scale']:g}",
                *[f"{np.mean([t[i][f] for t in scales]):.2f}" for f in ("error", "error_max", "bound")],
            ]
            for i, row in enumerate(scales[0])
        ]
        tables.append(
            "<p>Temperature: the same keys and codes under flatter and sharper logits.</p>"
            + _table(["logits", "L1 error", "largest", "2 tanh(Delta / 4)"], cells)
        )
    text = (
        "What the probe of every training logs to MLflow and says in the training log (docs/model.md). A failure"
        " without a warning is said here, too: a codebook that starts too early, or unbounded keys, show in the AUC"
        " alone."
    )
    return _section("Failure modes", text, *tables)


def _refined(r: Results) -> str:
    if not r.latency:
        return ""
    rows = r.latency["rows"]
    names = [n for n in rows[0] if n not in ("length", "cache_bytes")]

    def draw(axes) -> None:
        for name in names:
            axes[0].plot(
                [row["length"] for row in rows], [row[name] for row in rows], marker="o", ms=3, label=_name(name)
            )
        axes[0].set(xscale="log", yscale="log", xlabel="events", ylabel="ms for 500 candidates, one CPU thread")
        _legend(axes[0])
        for data_set in SETS:
            known = [
                (k, d)
                for k, n in ((0, "vql"), (4, "vql_refined_4"), (16, "vql_refined_16"), (64, "vql_refined_64"))
                if (d := r.difference(data_set, n))
            ]
            _errorbars(axes[1], known, SETS[data_set])
        axes[1].axhline(0, color="0.6", lw=0.8)
        axes[1].set(xlabel="refined events", ylabel="AUC minus exact attention")
        _legend(axes[1])

    table = _table(
        ["events", *[f"{_name(n)}, ms" for n in names], "cache, KiB"],
        [[f"{row['length']:,}", *[f"{row[n]:.1f}" for n in names], f"{row['cache_bytes'] / 1024:.0f}"] for row in rows],
    )
    text = (
        "Refined codes keep the head of the attention exact. Memory: the plain cache is all that plain VQL stores of a"
        " user; refined codes also need the user's events by code (4 bytes each) and the items' keys. On these data,"
        " with a warm-up long enough, plain VQL loses nothing that refinement could recover, and refinement costs more"
        " than exact attention on histories below some thousand events; it pays where the codebook is too small."
    )
    return _section("Refined codes: accuracy, latency, memory", text, _figure(draw, 2), table)


def _memory(r: Results) -> str:
    if not r.memory:
        return ""
    rows = r.memory["rows"]

    def draw(axes) -> None:
        for shape in dict.fromkeys(row["shape"] for row in rows):
            mine = [row for row in rows if row["shape"] == shape]
            axes[0].plot(
                [row["events"] for row in mine],
                [row["bytes"] / 2**20 for row in mine],
                marker="o",
                ms=4,
                label=f"{shape} (longest {max(row['longest'] for row in mine):,})",
            )
        axes[0].set(
            xlabel="events in the batch (64 users, 64 targets each)", ylabel="MiB held by a step", ylim=(0, None)
        )
        _legend(axes[0])

    table = _table(
        ["histories", "events", "longest", "MiB"],
        [[row["shape"], f"{row['events']:,}", f"{row['longest']:,}", f"{row['bytes'] / 2**20:,.0f}"] for row in rows],
    )
    return _section(
        "Memory of a training step",
        f"Forward and backward, {html.escape(r.memory['device'])}: linear in the events of the batch, whether one user"
        " has nearly all of them or all have the same. Padding to the longest would cost 64 times the longest.",
        _figure(draw, 1),
        table,
    )


def _choices(r: Results) -> str:
    named = {
        "vql": "as it is: codebook loss .1, commitment .25, straight-through, 300 steps of warm-up",
        "vql_warmup_100": "100 steps of warm-up",
        "vql_warmup_20": "20 steps of warm-up",
        "vql_loss_weight_0.01": "codebook loss .01",
        "vql_loss_weight_1": "codebook loss 1",
        "vql_commitment_1": "commitment 1",
        "vql_ema": "codewords by moving averages (.99)",
        "vql_simvq": "SimVQ: frozen codewords, learned map",
        "vql_shared_codebook": "one codebook for all heads, assignment per head",
        "vql_aggregated_gradient": "task gradient to the codewords alone",
        "vql_both_gradients": "task gradient to keys and codewords",
        "vql_l2_keys": "keys of unit length instead of LayerNorm",
        "vql_uneven_codes": "16, 32, 80 and 128 codes in the four groups",
        "vql_recent_50": "newest 50 events exact",
        "vql_kernel_outside": "kernel outside the softmax",
        "vql_periodic_kernel": "kernel with a daily period",
        "vql_rank_kernel": "kernel of ranks instead of times",
    }
    rows = [
        [
            what,
            *[str(d) if n != "vql" and (d := r.difference(s, n, "vql")) else "" for s in ("simulated", "drifting")],
            f"{r.mean('simulated', n, 'key_error'):.3f}",
            f"{r.mean('simulated', n, 'perplexity'):.2f}",
        ]
        for n, what in named.items()
        if r.runs("simulated", n)
    ]
    text = (
        "AUC minus VQL as it is. The warm-up is what matters: keys that have not learned anything yet make a bad"
        " codebook, and the codebook's loss then holds them there. The other choices stay as they are unless an"
        " interval here says otherwise on both sets."
    )
    return _section(
        "Open choices, tried once",
        text,
        _table(["choice", "simulated", "tastes that change", "key error", "perplexity / C"], rows),
    )


# ---- parts -----------------------------------------------------------------------------------------------------------


def _about(r: Results) -> str:
    versions = sorted({run["torch"] for run in r.trainings})
    failed = [run for run in r.trainings if "failed" in run]
    model = ModelConfig()
    lost = f" {len(failed)} diverged: {', '.join(sorted({run['variant'] for run in failed}))}." if failed else ""
    return (
        f"{len(r.trainings)} trainings, torch {', '.join(versions)}.{lost} All models share embeddings and head;"
        f" attention has {model.heads} heads of width {model.head_width}, VQL {model.groups} groups of {model.codes}"
        " codes unless said otherwise. Intervals are 95 % of Student's t over runs."
    )


def _section(title: str, text: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{''.join(parts)}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    return (
        f"<div class=scroll><table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>"
        + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
        + "</tbody></table></div>"
    )


def _figure(draw: Callable, columns: int) -> str:
    figure, axes = plt.subplots(1, columns, figsize=(3.9 * columns, 2.9), squeeze=False)
    draw(axes[0])
    for axis in axes[0]:
        _stand_without_data(axis)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=False)
    plt.close(figure)
    text = buffer.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _errorbars(axis, known: Sequence[tuple[float, Difference]], label: str) -> None:
    """Draw what was measured over what it was measured at, with its intervals."""
    means, halves = [found.mean for _, found in known], [found.half for _, found in known]
    axis.errorbar([at for at, _ in known], means, halves, marker="o", ms=3, capsize=2, label=label)


def _legend(axis) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)


def _stand_without_data(axis) -> None:
    """Let a panel of which nothing was measured be drawn empty: a logarithmic axis needs data."""
    for name in "xy":
        values = np.concatenate(
            [np.ravel(getattr(line, f"get_{name}data")()).astype(float) for line in axis.lines] or [np.array([])]
        )
        if getattr(axis, f"get_{name}scale")() == "log" and not (np.isfinite(values) & (values > 0)).any():
            axis.set(**{f"{name}scale": "linear"})


def _shown(difference: Difference | None) -> str:
    return "not measured" if difference is None else str(difference)


def _name(variant: str) -> str:
    return variant.replace("_", " ").replace("vql", "VQL").replace("sdim", "SDIM").replace("1 groups", "1 group")


def _loaded(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Claims of VQL, measured</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2330; --quiet: #5b6472; --line: #dfe3e8; --ground: #fff;
  --good: #11703c; --bad: #b42318; --open: #8a5a00 }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ee; --quiet: #a2abb8; --line: #343c48; --ground: #14181f;
  --good: #5fd08d; --bad: #ff8a7a; --open: #e8b85a }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  padding: 0 1.2rem; max-width: 1180px }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .3rem }}
  p {{ max-width: 75ch }} .about {{ color: var(--quiet) }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }}
  td, th {{ text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top }}
th {{ color: var(--quiet); font-weight: 600 }} .scroll {{ overflow-x: auto }} figure {{ margin: .8rem 0;
  background: #fff; border-radius: 6px; padding: .4rem; overflow-x: auto }} svg {{ max-width: 100%; height: auto }}
.good {{ color: var(--good); font-weight: 600 }} .bad {{ color: var(--bad); font-weight: 600 }}
  .open {{ color: var(--open); font-weight: 600 }} summary {{ cursor: pointer; margin: .5rem 0; font-weight: 600 }}
</style>
<h1>Claims of VQL, measured</h1><p class="about">{about}</p>
<div class=scroll><table><thead><tr><th>claim</th><th>measured</th><th>verdict</th></tr></thead><tbody>
{verdicts}
</tbody></table></div>
{sections}
</html>
"""
