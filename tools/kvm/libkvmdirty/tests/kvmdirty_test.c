// SPDX-License-Identifier: GPL-2.0-only
/*
 * libkvmdirty: the same cases over every back end.
 *
 *	kvmdirty_test [--require] [PATTERN]
 *
 * PATTERN: only cases whose name ("slot-ring/exact") holds it.  --require: a back end
 * that the kernel lacks is a failure, not a skip.  Exit status: 0 all passed or
 * skipped, 1 not so, 4 there is no usable KVM, and the cases that need none passed.
 */
#include "env.h"

char *ktap_why;

static const struct mode modes[] = {
	{ "slot-ring", KVMDIRTY_SLOT_RING, 0, false },
	{ "slot-ring-by-slot", KVMDIRTY_SLOT_RING, 0, true },
	{ "ring", KVMDIRTY_RING, 0, false },
	{ "bitmap", KVMDIRTY_BITMAP, 0, false },
	{ "bitmap-no-manual", KVMDIRTY_BITMAP, KVMDIRTY_OPEN_NO_MANUAL, false },
};

static const struct test_case *const cases[] = { slot_cases, fd_cases, open_cases, vm_cases };
static const struct test_case *const once[] = { once_cases, vm_once_cases };

/* What is run, or only counted, of what main() was told */
struct todo {
	const char *pattern;
	bool require, count;
	int has;		/* kvmdirty_probe() */
	struct ktap ktap;
	size_t nr;
};

static void each_mode(struct todo *todo, const struct mode *mode, const struct test_case *c)
{
	char name[100];

	snprintf(name, sizeof(name), "%s/%s", mode->name, c->name);
	if (!strstr(name, todo->pattern))
		return;
	todo->nr++;
	if (todo->count)
		return;
	if (todo->has & 1 << mode->backend || c->always)
		ktap_run(&todo->ktap, name, c->fn, mode);
	else
		ktap_verdict(&todo->ktap, todo->require ? KTAP_FAIL : KTAP_SKIP, name,
			     "this kernel does not have it");
}

static void all_cases(struct todo *todo)
{
	const struct test_case *c;
	size_t m, t;

	for (m = 0; m < ARRAY_SIZE(modes) && todo->has >= 0; m++) {
		for (t = 0; t < ARRAY_SIZE(cases); t++) {
			if (modes[m].by_slot && cases[t] != vm_cases)
				continue;
			for (c = cases[t]; c->name; c++)
				each_mode(todo, &modes[m], c);
		}
	}
	for (t = 0; t < ARRAY_SIZE(once); t++) {
		for (c = once[t]; c->name; c++) {
			if (!strstr(c->name, todo->pattern) || (c->needs_kvm && todo->has < 0))
				continue;
			todo->nr++;
			if (!todo->count)
				ktap_run(&todo->ktap, c->name, c->fn, NULL);
		}
	}
}

static int tell_usage(const char *me, int status)
{
	fprintf(status ? stderr : stdout, "usage: %s [--require] [PATTERN]\n", me);
	return status;
}

int main(int argc, char **argv)
{
	struct todo todo = { .pattern = "" };
	struct minivm vm;
	int r;

	for (r = 1; r < argc; r++) {
		if (!strcmp(argv[r], "--require"))
			todo.require = true;
		else if (argv[r][0] != '-')
			todo.pattern = argv[r];
		else
			return tell_usage(argv[0], strcmp(argv[r], "--help") ? 2 : 0);
	}
	todo.has = minivm_create(&vm);
	if (!todo.has)
		todo.has = kvmdirty_probe(vm.fd);

	todo.count = true;
	all_cases(&todo);
	printf("KTAP version 1\n1..%zu\n", todo.nr);
	todo.count = false;
	all_cases(&todo);
	if (todo.has < 0)
		printf("no usable KVM: /dev/kvm: %s\n", strerror(-todo.has));
	return todo.ktap.failed ? KTAP_FAIL : todo.has < 0 ? KTAP_SKIP : KTAP_PASS;
}
