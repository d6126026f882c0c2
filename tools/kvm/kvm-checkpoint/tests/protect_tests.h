/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The tests of protect_test that are in files of their own; protect_test.c has the list of all.
 */
#ifndef KC_TESTS_PROTECT_TESTS_H
#define KC_TESTS_PROTECT_TESTS_H

/* protect_end.c */
void test_term_in_epoch(void);
void test_hup_in_epoch(void);
void test_nohup(void);
void test_term_between(void);
void test_term_in_copy(void);
void test_term_alone(void);
void test_shutdown_lost(void);
void test_term_lost(void);
void test_term_untold(void);
void test_term_unheard(void);
void test_link_lost(void);
void test_other_key(void);
void test_unread_stdout(void);
void test_unread_stderr(void);

/* protect_trouble.c */
void test_full_standby(void);
void test_full_standby_dies(void);
void test_no_memory(void);
void test_other_standby(void);
void test_full_store(void);
void test_identity(void);
void test_taken_over(void);
void test_taken_over_at_end(void);
void test_taken_over_resists(void);

/* protect_blip.c */
void test_blip(void);
void test_blip_set_back(void);
void test_blip_other_sender(void);

/* protect_switch.c */
void test_switchover(void);
void test_switchover_stopped(void);
void test_switchover_fails(void);
void test_switchover_late(void);
void test_switchover_unknown(void);
void test_switchover_directory(void);

/* protect_net.c */
void test_net(void);
void test_net_take(void);
void test_net_blip(void);
void test_net_epochs(void);
void test_net_limit(void);
void test_net_limit_acked(void);
void test_net_lease(void);
void test_net_no_epochs(void);
void test_net_reopened(void);
void test_net_stands_still(void);
void test_net_first(void);
void test_net_first_lease(void);
void test_net_first_alone(void);
void test_net_second(void);
void test_net_first_dies(void);
void test_net_limit_dies(void);
void test_net_first_stopped(void);
void test_net_restarted(void);
void test_net_given_up(void);
void test_net_given_up_twice(void);
void test_net_held_for_others(void);
void test_net_detached(void);
void test_net_shutdown_untold(void);
void test_net_taken_over(void);
void test_net_switchover(void);
void test_net_pass(void);
void test_net_directory(void);
void test_net_refused(void);
void test_net_refused_tap(void);
void test_net_unplug_usage(void);
void test_net_usage(void);

/* protect_plug.c: what the kernel holds back */
void test_plug(void);
void test_plug_killed(void);
void test_plug_qemu_dies(void);
void test_plug_restarted(void);
void test_plug_unplugged(void);
void test_plug_removed(void);
void test_plug_refused_later(void);
void test_plug_guard_unheard(void);
void test_plug_guard_fails(void);
void test_plug_guard_slow(void);
void test_plug_paused(void);
void test_plug_refused_ingress(void);
void test_unplug_others(void);
void test_unplug_locked(void);

/* protect_disk.c */
void test_disk(void);
void test_disk_take(void);
void test_disk_sparse(void);
void test_disk_store(void);
void test_disk_blip(void);
void test_disk_set_back(void);
void test_disk_long_blip(void);
void test_disk_resumed(void);
void test_disk_resumed_killed(void);
void test_disk_not_resumed(void);
void test_disk_killed(void);
void test_disk_job_ends(void);
void test_disk_job_ends_again(void);
void test_disk_fails(void);
void test_disk_frozen(void);
void test_disk_frozen_shortly(void);
void test_disk_switchover(void);
void test_disk_full(void);
void test_disk_refused(void);
void test_disk_no_job(void);
void test_disk_images(void);
void test_disk_locked(void);
void test_disk_garbage(void);
void test_disk_usage(void);

/* protect_free.c */
void test_holes(void);
void test_holes_late(void);
void test_holes_standby(void);
void test_holes_kept(void);
void test_holes_kept_later(void);
void test_states(void);
void test_states_take(void);
void test_states_spoilt(void);
void test_states_reports(void);
void test_states_kexec(void);
void test_states_outside(void);
void test_states_nowhere(void);
void test_states_ranges(void);
void test_states_lies(void);
void test_states_lies_take(void);
void test_hints(void);
void test_hints_garbage(void);
void test_hints_long(void);
void test_hints_wrap(void);
void test_hints_block(void);
void test_hints_more(void);
void test_hints_offset(void);

/* protect_pairs.c */
void test_pairs(void);

/* protect_guest.c */
void test_frozen(void);
void test_run_states(void);
void test_other_run_states(void);
void test_first_run_state(void);
void test_off(void);
void test_goes_slowly(void);
void test_lost(void);
void test_take(void);
void test_take_ready(void);
void test_take_spoilt(void);
void test_take_late(void);
void test_take_layout(void);
void test_take_stopped(void);
void test_take_dies_stopped(void);
void test_take_dies_saved(void);
void test_take_garbage(void);
void test_take_by_monitor(void);
void test_take_spoilt_by_monitor(void);
void test_take_late_by_monitor(void);
void test_take_stopped_by_monitor(void);
void test_take_dies_by_monitor(void);
void test_take_garbage_by_monitor(void);
void test_take_dies_unsaid(void);
void test_take_dies_asked(void);
void test_take_fails(void);
void test_take_ends_in_garbage(void);
void test_blocked(void);
void test_plugged(void);
void test_devices(void);
void test_discarded(void);
void test_unplugged(void);
void test_plugged_unseen(void);
void test_plugged_unknown(void);
void test_busy(void);
void test_flush(void);
void test_lease(void);
void test_lease_untold(void);
void test_busy_term(void);
void test_busy_term_early(void);
void test_waits(void);
void test_core(void);

#endif
