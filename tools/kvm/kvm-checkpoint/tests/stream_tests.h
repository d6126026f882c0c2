/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The tests of stream_test that are in files of their own; stream_test.c has the list of all.
 */
#ifndef KC_TESTS_STREAM_TESTS_H
#define KC_TESTS_STREAM_TESTS_H

/* stream_store.c */
void test_resync_directory(void);
void test_merging(void);
void test_store_disk(void);
void test_resync_disk(void);
void test_restore_disk(void);
void test_disk_missing(void);
void test_damage_directory(void);
void test_changing_directory(void);
void test_read_while_merged(void);
void test_read_while_replaced(void);
void test_verify_once(void);
void test_no_files(void);
void test_open_store(void);

/* stream_full.c */
void test_full_directory(void);
void test_full_standby(void);
void test_full_ram_dir(void);
void test_full_holes(void);

/* stream_hostile.c */
void test_lying_runs(void);
void test_overlapping_runs(void);
void test_overlapping_trial(void);
void test_endless_runs(void);
void test_lying_redo(void);

/* stream_kills.c */
void test_killed_lock(void);
void test_kill_standby(void);
void test_kill_primary(void);
void test_kill_directory(void);
void test_kill_directory_disk(void);

/* stream_crash.c: @before_open is told what is going to be opened */
extern void (*before_open)(const char *name);
void test_crash_standby(void);
void test_crash_standby_trial(void);
void test_crash_standby_bad(void);
void test_crash_directory(void);

/* stream_failover.c */
void test_failover(void);
void test_failover_reasons(void);
void test_no_failover(void);
void test_failover_again(void);
void test_reboot(void);
void test_foreign_directory(void);
void test_qemu(void);
void test_qemu_stopped(void);
void test_qemu_differs(void);
void test_io_error(void);
void test_silent_qemu(void);

/* stream_ready.c */
void test_kinds(void);
void test_trial(void);
void test_slow_trial(void);
void test_trial_killed(void);
void test_ahead_killed(void);
void test_trial_promoted(void);
void test_trial_silence(void);
void test_warm_dies(void);

/* stream_be_qemu.c */
int be_qemu(int argc, char **argv);

/* stream_bandwidth.c */
void test_bandwidth(void);

/* stream_usage.c */
void test_usage(void);

/* stream_status.c */
void test_status(void);
void test_full_queue(void);
void test_idle_clients(void);
void test_prometheus(void);

/* stream_standby.c */
void test_restarted(void);
void test_restarted_age(void);
void test_flood(void);
void test_standby_stopped(void);
void test_configuration(void);
void test_taken_over(void);

#endif
