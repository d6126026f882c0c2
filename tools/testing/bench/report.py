#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Makes tables and the plots' data of what scripts/bench measured.

usage: report.py DIR

Reads DIR/results.jsonl; writes DIR/report.md, DIR/report.txt and DIR/*.dat.
"""

import json
import os
import sys
import textwrap

MODES = ("bitmap", "upstream", "slot")
PEERS = MODES[:2]
TITLES = {"bitmap": "bitmap", "upstream": "upstream ring", "slot": "slot ring"}
# A peer that is cheaper by no more is as good: 2%.
AS_GOOD = 1.02


def size(nbytes):
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.4g} {name}"
    return f"{nbytes:,.0f} B"


def number(value):
    """Three digits or more."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"


def micro(ns):
    return number(ns / 1000)


class Report:
    """The same tables twice: for readers of Markdown and of plain text."""

    def __init__(self):
        self.md = []
        self.txt = []

    def heading(self, text):
        self.md += [f"## {text}", ""]
        self.txt += [text, "=" * len(text), ""]

    def text(self, text):
        self.md += [text, ""]
        self.txt += textwrap.wrap(text, 100) + [""]

    def table(self, head, rows):
        rows = [[str(cell) for cell in row] for row in rows]
        width = [max(len(row[i]) for row in [head] + rows) for i in range(len(head))]
        self.md += ["| " + " | ".join(row) + " |" for row in
                    [head, ["---"] + ["---:"] * (len(head) - 1)] + rows] + [""]
        self.txt += ["  ".join([row[0].ljust(width[0])] +
                               [c.rjust(w) for c, w in zip(row[1:], width[1:])]).rstrip()
                     for row in [head] + rows] + [""]

    def items(self, items):
        self.md += [f"- {item}" for item in items] + [""]
        self.txt += [f"- {item}" for item in items] + [""]


class Results:
    """Measurements, by part and by what was measured."""

    def __init__(self, lines):
        self.parts = {}
        for line in lines:
            m = json.loads(line)
            where = (m["slot_bytes"], m["dirty_pages"], m["order"], m["vcpus"])
            self.parts.setdefault(m["part"], []).append((where, m))

    def where(self, part):
        """The points of a part, in the order measured, without repetition."""
        return list(dict.fromkeys(where for where, _ in self.parts.get(part, [])))

    def get(self, part, where, mode, **also):
        for w, m in self.parts.get(part, []):
            if w == where and m["mode"] == mode and all(m[k] == v for k, v in also.items()):
                return m
        return None

    def cost(self, part, where, mode, phase="cost", **also):
        m = self.get(part, where, mode, **also)
        return m and m["ns_per_page"][phase]["median"]


def name_of(where):
    nbytes, pages, order, _ = where
    everything = pages * 4096 == nbytes
    return size(nbytes), f"{'all ' if everything else ''}{pages:,} {order.replace('-', ' ')}"


def ratio(ours, peers):
    """Ours to the cheapest of the peers that are there."""
    peers = [p for p in peers if p is not None]
    return ours / min(peers) if ours is not None and peers else None


def show_ratio(value):
    return "-" if value is None else f"{value:.2f}"


def matrix(rep, res):
    points = res.where("matrix") or res.where("peers")
    if not points:
        return
    rep.heading("Instructions per dirty page, to find it and to re-arm it")
    rep.text("One vCPU. The patched kernel re-protects single pages with less work, which helps "
             "all three, so the peers are there on both kernels. The last column is the slot ring "
             "against the cheaper peer of the same kernel.")
    rows = []
    for w in sorted(points, key=lambda w: (w[0], w[1])):
        here = [res.cost("matrix", w, m) for m in MODES]
        rows.append([*name_of(w)] + [number(res.cost("peers", w, m)) for m in PEERS] +
                    [number(c) for c in here] + [show_ratio(ratio(here[2], here[:2]))])
    rep.table(["slot", "dirty pages", "bitmap, unpatched", "upstream ring, unpatched",
               "bitmap", "upstream ring", "slot ring", "slot ring / best peer"], rows)

    rep.heading("Instructions per dirty page of the guest: write, fault and log")
    rows = []
    for w in sorted(points, key=lambda w: (w[0], w[1])):
        rows.append([*name_of(w)] + [number(res.cost("peers", w, m, "guest")) for m in PEERS] +
                    [number(res.cost("matrix", w, m, "guest")) for m in MODES])
    rep.table(["slot", "dirty pages", "bitmap, unpatched", "upstream ring, unpatched",
               "bitmap", "upstream ring", "slot ring"], rows)


def cache(rep, res):
    points = sorted(res.where("cache"), key=lambda w: (w[0], w[1]))
    if not points:
        return
    rep.heading("Modelled cache misses per dirty page")
    rep.text("Of a vCPU's core and of a collector's, each with an L1d of 48 KiB and an L2 of 2 MiB: "
             "L1d misses / L2 misses. A miss is one whether somebody waits for it or not: "
             "prefetching takes none away. Instructions per dirty page, to find it and to "
             "re-arm it, in brackets; they have the plug-in's boot options, not those above.")
    for side, title in (("collect", "to find it and to re-arm it"),
                        ("guest", "of the guest's write: run, fault and log")):
        rows = []
        for w in points:
            row = [*name_of(w)]
            for mode in MODES:
                m = res.get("cache", w, mode)
                if m is None:
                    row.append("-")
                    continue
                pages = m["dirty_pages"] * m["iterations"]
                cell = "/".join(f"{m[f'{side}_{level}_misses'] / pages:,.2f}"
                                for level in ("l1d", "l2"))
                if side == "collect":
                    cell += f" ({number(m['ns_per_page']['cost']['median'])})"
                row.append(cell)
            rows.append(row)
        rep.text(title.capitalize() + ":")
        rep.table(["slot", "dirty pages"] + [TITLES[m] for m in MODES], rows)


def density(rep, res):
    points = sorted(res.where("density"), key=lambda w: (w[3], w[2] != "random", w[1]))
    if not points:
        return
    rep.heading("The same at every density of a slot of 1 GiB")
    rows = []
    for w in points:
        here = [res.cost("density", w, m) for m in MODES]
        density = w[1] * 409600 / w[0]
        rows.append([f"{density:.0f}%" if density >= 99 else f"{density:.2g}%", f"{w[1]:,}", w[2].replace("-", " "),
                     str(w[3])] + [number(c) for c in here] +
                    [show_ratio(ratio(here[2], here[:2]))])
    rep.table(["density", "pages", "order", "vCPUs", *TITLES.values(), "slot ring / best peer"],
              rows)


def verdict(rep, res):
    """Where are slot rings not the cheapest?"""
    worse, level, total = [], [], 0
    for part in ("matrix", "density"):
        for w in res.where(part):
            ours = res.cost(part, w, "slot")
            peers = {m: res.cost(part, w, m) for m in PEERS}
            peers = {m: c for m, c in peers.items() if c is not None}
            if ours is None or not peers:
                continue
            total += 1
            best = min(peers, key=peers.get)
            slot, pages = name_of(w)
            text = (f"{slot}, {pages}, {w[3]} vCPU{'s' if w[3] > 1 else ''}: "
                    f"{number(ours)}, {TITLES[best]} {number(peers[best])} "
                    f"({(ours / peers[best] - 1) * 100:+.1f}%)")
            if ours > peers[best] * AS_GOOD:
                worse.append(text)
            elif ours > peers[best]:
                level.append(text)
    if not total:
        return
    rep.heading("Where slot rings are not the cheapest")
    if not worse and not level:
        rep.text(f"Nowhere: the cheapest at all {total} points.")
        return
    rep.text(f"At {len(worse)} of {total} points the cheaper peer is ahead by more than 2%"
             + (":" if worse else "."))
    if worse:
        rep.items(worse)
    if level:
        rep.text("And at these by less:")
        rep.items(level)


def rings(rep, res):
    points = sorted(res.where("rings"), key=lambda w: (w[0], w[1]))
    if not points:
        return
    sizes = sorted({m["ring_entries"] for _, m in res.parts["rings"]})
    rep.heading("What the size of the rings does")
    rep.text("Instructions per dirty page to find and re-arm / for the guest to write; one vCPU. "
             "A slot ring that is full leaves pages to the overflow log, an upstream ring makes "
             "the vCPU exit.")
    rows = []
    for entries in sizes:
        for mode in ("upstream", "slot"):
            row = [f"{entries:,}", TITLES[mode], size(entries * (16 if mode == "upstream" else 8))]
            for w in points:
                m = res.get("rings", w, mode, ring_entries=entries)
                row.append("-" if not m else
                           f"{number(m['ns_per_page']['cost']['median'])} / "
                           f"{number(m['ns_per_page']['dirty']['median'])}")
            rows.append(row)
    rep.table(["entries", "ring", "memory"] + [", ".join(name_of(w)) for w in points], rows)


def stall(rep, res):
    runs = [m for _, m in res.parts.get("stall", [])]
    if not runs:
        return
    m = runs[0]
    rep.heading(f"How a harvest of {m['dirty_pages']:,} pages holds up another vCPU")
    rep.text("Microseconds (1,000 instructions) from the random moment at which a vCPU's thread, "
             "of real-time priority and on the same CPU, is to wake up until it has written a page "
             "that takes mmu_lock. Held up: the longest, less the median without a harvest; that "
             "is the longest stretch in which the harvest could not be preempted. The longest alone "
             "is the timer interrupt's.")
    rows = []
    for m in runs:
        alone, beside = m["ns"]["alone"], m["ns"]["harvest"]
        rows.append([TITLES[m["mode"]], f"{beside['samples']:,}", micro(alone["median"]),
                     micro(alone["max"]), micro(beside["median"]), micro(beside["p99"]),
                     micro(beside["max"]), micro(beside["max"] - alone["median"])])
    rep.table(["mechanism", "samples", "median alone", "longest alone", "median", "99%",
               "longest", "held up"], rows)


def memory(rep, res):
    runs = {(m["mode"], m["vcpus"], m["slot_bytes"]): m for _, m in res.parts.get("memory", [])}
    if not runs:
        return
    few, many = min(k[1] for k in runs), max(k[1] for k in runs)
    small, big = min(k[2] for k in runs), max(k[2] for k in runs)
    rep.heading("Memory that the log takes")
    rep.text("From the kernel's accounting (VmallocUsed and SUnreclaim): VMs that log against VMs "
             "that do not, with default sizes of rings.")
    rows = []
    for mode in MODES:
        base = runs.get((mode, few, small))
        vcpus = runs.get((mode, many, small))
        slots = runs.get((mode, few, big))
        if not (base and vcpus and slots):
            continue
        nr = base["slots"]
        per_vcpu = (vcpus["bytes"] - base["bytes"]) / (many - few)
        per_gib = (slots["bytes"] - base["bytes"]) / nr / ((big - small) >> 30)
        rest = base["bytes"] - few * per_vcpu - nr * per_gib * (small >> 30)
        rows.append([TITLES[mode], size(per_vcpu) if mode == "upstream" else "-",
                     size(per_vcpu / nr) if mode == "slot" else "-",
                     size(max(rest, 0) / nr), size(per_gib), size(vcpus["bytes"])])
    rep.table(["mechanism", "per vCPU", "per vCPU and slot", "per slot", "per GiB",
               f"{many} vCPUs, {nr} slots of {size(small)}"], rows)


def write_density(out, res):
    """One block for each panel of density.svg: percent, then the modes."""
    with open(os.path.join(out, "density.dat"), "w", encoding="ascii") as f:
        for vcpus in (1, 2):
            for order in ("random", "in-order"):
                f.write(f'"{order.replace("-", " ")}, {vcpus} vCPU{"s" if vcpus > 1 else ""}"\n')
                for w in sorted(res.where("density"), key=lambda w: w[1]):
                    if w[2] == order and w[3] == vcpus:
                        costs = [res.cost("density", w, m) for m in MODES]
                        f.write(f"{w[1] * 409600 / w[0]:.6g} " +
                                " ".join("?" if c is None else f"{c:.1f}" for c in costs) + "\n")
                f.write("\n\n")


def write_stall(out, res):
    """One block for each mode: microseconds, share of the writes that took as long or longer."""
    runs = {m["mode"]: m for _, m in res.parts.get("stall", [])}
    with open(os.path.join(out, "stall.dat"), "w", encoding="ascii") as f:
        for mode in MODES:
            f.write(f'"{TITLES[mode]}"\n')
            if mode in runs:
                data = runs[mode]["ns"]["harvest"]
                left = data["samples"]
                for start, n in data["histogram"]:
                    f.write(f"{start / 1000:.3f} {left / data['samples']:.6g}\n")
                    left -= n
                f.write(f"{data['max'] / 1000:.3f} {1 / data['samples']:.6g}\n")
            f.write("\n\n")


def write_rings(out, res):
    """One block for each workload: entries, upstream, slot."""
    with open(os.path.join(out, "rings.dat"), "w", encoding="ascii") as f:
        for w in sorted(res.where("rings"), key=lambda w: (w[0], w[1])):
            f.write(f'"{", ".join(name_of(w))}"\n')
            for entries in sorted({m["ring_entries"] for _, m in res.parts["rings"]}):
                costs = [res.cost("rings", w, m, ring_entries=entries) for m in MODES[1:]]
                f.write(f"{entries} " +
                        " ".join("?" if c is None else f"{c:.1f}" for c in costs) + "\n")
            f.write("\n\n")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    out = sys.argv[1]
    with open(os.path.join(out, "results.jsonl"), encoding="ascii") as f:
        res = Results(f)

    rep = Report()
    verdict(rep, res)
    matrix(rep, res)
    cache(rep, res)
    density(rep, res)
    rings(rep, res)
    stall(rep, res)
    memory(rep, res)
    for name, lines in (("report.md", rep.md), ("report.txt", rep.txt)):
        with open(os.path.join(out, name), "w", encoding="utf-8") as f:
            f.write("\n".join(lines))
    write_density(out, res)
    write_stall(out, res)
    write_rings(out, res)
    return 0


if __name__ == "__main__":
    sys.exit(main())
