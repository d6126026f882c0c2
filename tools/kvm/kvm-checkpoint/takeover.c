// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint standby: failing over.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "process.h"
#include "standby.h"

static int taken_over(void *ctx, struct kc_err *err)
{
	struct standby *sb = ctx;

	return kc_ram_set_flags(sb->ram, kc_ram_flags(sb->ram) | KC_RAM_TAKEN_OVER, err);
}

void kc_free_launch(struct kc_launch *l)
{
	kc_free_argv(l->ram);
	free((char *)l->state);
}

int kc_make_launch(struct standby *sb, const struct kc_guest *g, struct kc_launch *l,
		   struct kc_err *err)
{
	uint32_t i, d;

	*l = (struct kc_launch){
		.argv = sb->exec, .bare = sb->bare, .capabilities = sb->capabilities, .guest = g,
		.state = kc_ram_state_path(sb->ram), .epoch = kc_ram_epoch(sb->ram),
		.stopped = kc_ram_flags(sb->ram) & KC_RAM_STOPPED,
		.timeout_ms = sb->load_timeout_ms, .committed = taken_over, .ctx = sb,
		.ram = calloc(g->nr_blocks + 1, sizeof(char *)),
	};
	for (i = 0; l->ram && i < g->nr_blocks; i++) {
		l->ram[i] = kc_ram_block_path(sb->ram, i);
		if (!l->ram[i])
			break;
	}
	for (d = 0; d < KC_MAX_DISKS; d++)
		l->disks[d] = kc_ram_disk_path(sb->ram, d);
	if (l->ram && l->state && i == g->nr_blocks)
		return 0;
	kc_free_launch(l);
	return kc_fail(err, ENOMEM, "out of memory");
}

int kc_check_command(struct standby *sb, const struct kc_guest *guest, struct kc_err *err)
{
	struct kc_launch l;
	int rc;

	if (!sb->exec || sb->bare)
		return 0;
	rc = kc_make_launch(sb, guest, &l, err);
	if (rc)
		return rc;
	rc = kc_launch_check(&l, err);
	if (!rc)
		rc = kc_launch_check_blocks(&l, err);
	kc_free_launch(&l);
	return rc ? -EOPNOTSUPP : 0;
}

/* As kc_launch(), into the QEMU that waits for that if there is one */
static int start_guest(struct standby *sb, pid_t *pid, struct kc_err *err)
{
	struct kc_launch l;
	int rc;

	rc = kc_make_launch(sb, kc_ram_guest(sb->ram), &l, err);
	if (rc)
		return rc;
	if (!sb->bare && !kc_qemu_lives(&sb->warm))
		kc_log(KC_LOG_INFO, "no QEMU has been started ahead");
	rc = kc_launch(&l, &sb->warm, err);
	/* A command that could not be started has not touched the RAM. */
	if (rc < 0 && sb->bare && (kc_ram_flags(sb->ram) & KC_RAM_TAKEN_OVER))
		kc_ram_set_flags(sb->ram, kc_ram_flags(sb->ram) & ~KC_RAM_TAKEN_OVER, NULL);
	kc_free_launch(&l);
	if (rc < 0)
		return rc;
	*pid = sb->warm.pid;
	qmp_close(&sb->warm.qmp);
	sb->warm.pid = 0;
	return rc;
}

int kc_check_epoch(struct standby *sb, struct kc_err *err)
{
	if (!kc_ram_epoch(sb->ram))
		return kc_fail(err, ENOENT, "there is no complete epoch to go on from");
	if (kc_ram_flags(sb->ram) & KC_RAM_UNHELD)
		return kc_fail(err, ESTALE,
			       "epoch %" PRIu64 " is of before the guest was protected, or what it sent since was not held back: clients may know more than it does; promote-anyway goes on from it nevertheless",
			       kc_ram_epoch(sb->ram));
	return 0;
}

int kc_take_over(struct standby *sb, const char *reason, pid_t *pid, struct kc_err *err)
{
	uint64_t t = kc_now_us(), fenced;
	bool anyway;
	int rc = 0;

	*pid = 0;
	pthread_mutex_lock(&sb->lock);
	sb->mode = FAILING_OVER;
	sb->promote = NULL;
	/* A guest that was handed over stands still since its last epoch. */
	anyway = sb->anyway || sb->switches;
	sb->anyway = false;
	if (sb->active)
		kc_session_kick(sb->active);
	while (sb->active && !rc)
		rc = kc_standby_wait(sb, 30000);
	pthread_mutex_unlock(&sb->lock);
	if (rc)
		return kc_fail(err, ETIMEDOUT, "the connection to the primary does not end");
	/* It may be another one than when this was decided. */
	rc = kc_check_epoch(sb, err);
	if (rc && (rc != -ESTALE || !anyway))
		return rc;
	rc = kc_ram_settle(sb->ram, err);
	if (rc)
		return rc;
	kc_log(KC_LOG_WARN, "failing over to epoch %" PRIu64 ": %s", kc_ram_epoch(sb->ram), reason);
	kc_status_phase(sb->status, "failing over");
	if (sb->fence && !sb->switches) {
		rc = kc_run_fence(sb->fence, sb->fence_timeout_ms, err);
		if (rc)
			return rc;
		kc_log(KC_LOG_INFO, "the fence says that the primary is dead");
	}
	fenced = kc_now_us();
	/* QEMU takes the images over */
	kc_ram_close_disks(sb->ram);
	rc = sb->exec ? start_guest(sb, pid, err) : taken_over(sb, err);
	if (rc < 0) {
		struct kc_err why;

		if (kc_ram_open_disks(sb->ram, &why))
			kc_log(KC_LOG_ERROR, "%s", why.text);
		return rc;
	}
	if (rc)
		kc_log(KC_LOG_ERROR, "%s: see QEMU's other monitors what it needs", err->text);
	kc_log(KC_LOG_WARN,
	       "taken over at epoch %" PRIu64 " after %.3f s, of which %.3f s since the fence%s",
	       kc_ram_epoch(sb->ram), (kc_now_us() - t) / 1e6, (kc_now_us() - fenced) / 1e6,
	       !sb->exec ? "" : rc ? ": the guest is here" :
	       kc_ram_flags(sb->ram) & KC_RAM_STOPPED ?
	       ": the guest is here, and stopped as it was when the epoch was taken" :
	       ": the guest runs here");
	kc_status_phase(sb->status, "taken over");
	return 0;
}

void kc_print_checkpoint(struct standby *sb)
{
	const struct kc_guest *g = kc_ram_guest(sb->ram);
	char *p;
	uint32_t i;

	printf("epoch %" PRIu64 "\n", kc_ram_epoch(sb->ram));
	for (i = 0; i < g->nr_blocks; i++) {
		p = kc_ram_block_path(sb->ram, i);
		printf("ram %s %" PRIu64 " %s\n", g->blocks[i].name, g->blocks[i].npages * KC_PAGE_SIZE,
		       p ? p : "");
		free(p);
	}
	for (i = 0; i < g->nr_disks; i++)
		printf("disk %s %" PRIu64 " %s\n", g->disks[i].name,
		       g->disks[i].npages * KC_PAGE_SIZE, kc_ram_disk_path(sb->ram, i));
	p = kc_ram_state_path(sb->ram);
	printf("state %s\n", p ? p : "");
	free(p);
	if (kc_ram_flags(sb->ram) & KC_RAM_STOPPED)
		printf("stopped\n");
	fflush(stdout);
}
