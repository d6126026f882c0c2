# SPDX-License-Identifier: GPL-2.0
#
# KVM dirty slot rings: how long harvests take and in which phase, how many pages
# they bring, and how full the rings were in the meantime.
#
#	perf record -a -e 'kvm_dirty_slot_ring:*' -- sleep 10
#	perf script -s kvm-dirty-slot-ring.py [-- vm=PID slot=N lines=N]
#
# vm= and slot= choose (slot as in the ABI, as_id << 16 | id; 0xffffffff are the calls on
# all slots of a VM); lines= is the number of lines that the time of the recording is
# divided into.

import math
import sys
from collections import defaultdict

ALL_SLOTS = 0xffffffff
# As the events count them; what comes after these is the end.
PHASES = ('wait', 'collect', 'protect', 'flush')
STARS = 40

options = {'vm': None, 'slot': None, 'lines': 20}


class Log:
    """What happened to the log of one memslot."""
    def __init__(self):
        self.calls = []     # (pages, runs, flags, {phase: ns}) of each harvest or reset
        self.failed = 0
        self.resets = 0
        self.fill = []      # (time, vcpu, used, entries)
        self.overflow = []  # (time, vcpu, pages)
        self.exits = []     # (time, vcpu)


class Call:
    """A call that is under way: where it is, and how long it was where."""
    def __init__(self, slot, when):
        self.slot = slot
        self.ns = [0] * len(PHASES)
        self.phase, self.since = 0, when

    def goes_on(self, phase, when):
        if self.phase < len(PHASES):
            self.ns[self.phase] += when - self.since
        self.phase, self.since = phase, when


calls = {}      # by thread
logs = defaultdict(Log)
first = last = None


def parse_args():
    for arg in sys.argv[1:]:
        name, _, value = arg.partition('=')
        try:
            if name not in options:
                raise ValueError
            options[name] = int(value, 0)
        except ValueError:
            sys.exit(f'kvm-dirty-slot-ring.py: {arg}: not vm=PID, slot=N or lines=N')
    if options['lines'] < 1:
        sys.exit('kvm-dirty-slot-ring.py: lines= is 1 or more')


def trace_begin():
    parse_args()


def goes_on(event):
    """A thread's call has come to another phase; one on all slots is at each of them."""
    thread, when = event['common_pid'], event['common_s'] * 10**9 + event['common_ns']
    call = calls.get(thread)
    inner = call and call.slot == ALL_SLOTS and event['slot'] != ALL_SLOTS
    if event['phase'] == 0 and not inner:
        calls[thread] = Call(event['slot'], when)
    elif call:
        call.goes_on(event['phase'], when)


# By name, so that the order of an event's fields does not matter.
def trace_unhandled(event_name, context, event, sample=None):
    global first, last
    system, _, name = event_name.partition('__')
    if system != 'kvm_dirty_slot_ring':
        return
    if name == 'kvm_dirty_slot_log_phase':
        goes_on(event)
        return
    slot = event.get('slot', ALL_SLOTS)
    # None if the recording began in its midst.
    call = calls.pop(event['common_pid'], None) if '_log_' in name or '_vm_' in name else None
    if options['vm'] not in (None, event['vm']) or options['slot'] not in (None, slot):
        return

    log = logs[(event['vm'], slot)]
    when = event['common_s'] + event['common_ns'] / 1e9
    first = when if first is None else min(first, when)
    last = when if last is None else max(last, when)

    if name == 'kvm_dirty_slot_ring_push':
        log.fill.append((when, event['vcpu'], event['used'], event['entries']))
    elif name == 'kvm_dirty_slot_ring_overflow':
        log.overflow.append((when, event['vcpu'], event['npages']))
    elif name == 'kvm_dirty_slot_ring_exit':
        log.exits.append((when, event['vcpu']))
    elif call:
        reset = name.endswith('reset')
        log.resets += reset
        log.failed += event['ret'] < 0
        log.calls.append((event['pages'] + event.get('collected', 0), event.get('runs', 0),
                          event['flags'], dict(zip(PHASES, call.ns))))


def quantile(values, part):
    """values are sorted; the one that this part of them does not exceed."""
    return values[max(math.ceil(len(values) * part) - 1, 0)]


def bar(n, most):
    return '*' * (max(1, n * STARS // most) if n else 0)


def power(n):
    return n.bit_length()


def power_name(p):
    return '0' if not p else f'{1 << (p - 1)} .. {(1 << p) - 1}'


def histogram(what, values):
    counts = defaultdict(int)
    for v in values:
        counts[power(v)] += 1
    print(f'\n  {what:>28} {"calls":>8}')
    for p in range(min(counts), max(counts) + 1):
        print(f'  {power_name(p):>28} {counts[p]:8} {bar(counts[p], max(counts.values()))}'.rstrip())


def show_calls(log):
    pause = [sum(ns.values()) for _, _, _, ns in log.calls]
    harvests = len(log.calls) - log.resets
    print(f'  {harvests} harvests, {log.resets} resets, {log.failed} failed, '
          f'{sum(c[0] for c in log.calls)} pages, {sum(c[1] for c in log.calls)} runs')

    print(f'\n  {"us":>8} {"p50":>10} {"p90":>10} {"p99":>10} {"max":>10} {"share":>7}')
    for name in ('pause',) + PHASES:
        ns = sorted(pause if name == 'pause' else (c[3][name] for c in log.calls))
        share = 100 * sum(ns) / sum(pause) if sum(pause) else 0
        cols = ' '.join(f'{q / 1000:10.1f}' for q in
                        [quantile(ns, part) for part in (.5, .9, .99)] + [ns[-1]])
        print(f'  {name:>8} {cols} {share:6.0f}%')

    histogram('pause, ns', pause)
    histogram('pages', [c[0] for c in log.calls])


def show_fill(log):
    """The fullest ring in each part of the recording."""
    lines = options['lines']
    step = (last - first) / lines or 1e-9
    part = lambda when: min(int((when - first) / step), lines - 1)

    peak = {}
    for when, vcpu, used, entries in log.fill:
        i = part(when)
        if i not in peak or used / entries > peak[i][0] / peak[i][1]:
            peak[i] = (used, entries, vcpu)
    pages, overflow, exits = [0] * lines, [0] * lines, [0] * lines
    for when, _, _, _ in log.fill:
        pages[part(when)] += 1
    for when, _, npages in log.overflow:
        overflow[part(when)] += npages
    for when, _ in log.exits:
        exits[part(when)] += 1

    print(f'\n  {"ms":>9} {"pages":>8} {"overflow":>8} {"exits":>6} {"vcpu":>5} {"fullest ring":>14}')
    for i in range(lines):
        used, entries, vcpu = peak.get(i, (0, 1, '-'))
        fill = f'{used}/{entries}' if i in peak else '-'
        print(f'  {i * step * 1000:9.1f} {pages[i] + overflow[i]:8} {overflow[i]:8} {exits[i]:6} '
              f'{vcpu:>5} {fill:>14} {bar(used, entries)}'.rstrip())


def trace_end():
    if not logs:
        print('No event of kvm_dirty_slot_ring: was one recorded, of this VM and slot?')
    for (vm, slot), log in sorted(logs.items()):
        print(f'VM {vm}, ' + ('all slots' if slot == ALL_SLOTS else f'slot {slot:#x}'))
        if log.calls:
            show_calls(log)
        if log.fill or log.overflow:
            show_fill(log)
        print()
