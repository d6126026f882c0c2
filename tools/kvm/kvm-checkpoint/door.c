// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint standby: who gets in, and what is told of those who do not.
 */
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "standby.h"

/*
 * Who has no key can only open connections.  If there are too many, those that have said least are
 * ended: a primary speaks first, and at once.
 */
#define MAX_SESSIONS 64u
/* With those that are ending */
#define MAX_THREADS (4 * MAX_SESSIONS)

/* So many refusals are told in so long a time */
#define MAX_TOLD 5u
#define TELL_US 10000000ull

/* Somebody could fill the log. */
void kc_session_refused(struct standby *sb, const char *whom, const char *why)
{
	bool tell;

	pthread_mutex_lock(&sb->lock);
	tell = sb->nr_told++ < MAX_TOLD;
	pthread_mutex_unlock(&sb->lock);
	if (tell)
		kc_log(KC_LOG_WARN, "refused %s: %s", whom, why);
}

void kc_session_tell(struct standby *sb)
{
	uint64_t now = kc_now_us();
	unsigned int more = 0;

	pthread_mutex_lock(&sb->lock);
	if (now - sb->told_us >= TELL_US) {
		more = sb->nr_told > MAX_TOLD ? sb->nr_told - MAX_TOLD : 0;
		sb->nr_told = 0;
		sb->told_us = now;
	}
	pthread_mutex_unlock(&sb->lock);
	if (more)
		kc_log(KC_LOG_WARN, "refused %u connections more", more);
}

static bool has_spoken(const struct session *s)
{
	struct tcp_info info = { .tcpi_bytes_received = 0 };
	socklen_t len = sizeof(info);

	return getsockopt(s->fd, IPPROTO_TCP, TCP_INFO, &info, &len) || info.tcpi_bytes_received;
}

/* With the lock: who is ended to make room, the oldest of those that have said least */
static struct session *find_victim(struct standby *sb)
{
	struct session *s, *victim = NULL;
	bool spoken = true;

	/* The oldest one is the last one. */
	for (s = sb->sessions; s; s = s->next) {
		if (s->is_primary || s->kicked || (!spoken && has_spoken(s)))
			continue;
		spoken = has_spoken(s);
		victim = s;
	}
	return victim;
}

/* With the lock: room for another one.  False if there is none. */
static bool make_room(struct standby *sb)
{
	struct session *s;
	unsigned int nr = 0;

	for (s = sb->sessions; s; s = s->next)
		nr += !s->kicked;
	if (nr >= MAX_SESSIONS) {
		s = find_victim(sb);
		if (!s)
			return false;
		kc_session_kick(s);
	}
	return sb->nr_sessions < MAX_THREADS;
}

static void take(struct standby *sb, int fd)
{
	struct session *s = calloc(1, sizeof(*s));

	pthread_mutex_lock(&sb->lock);
	if (!s || !make_room(sb)) {
		pthread_mutex_unlock(&sb->lock);
		kc_session_refused(sb, "a connection", "there are too many");
		free(s);
		close(fd);
		return;
	}
	*s = (struct session){ .sb = sb, .fd = fd, .next = sb->sessions };
	if (pthread_create(&s->thread, NULL, kc_session_run, s)) {
		free(s);
		close(fd);
	} else {
		pthread_detach(s->thread);
		sb->sessions = s;
		sb->nr_sessions++;
	}
	pthread_mutex_unlock(&sb->lock);
}

void kc_session_take(struct standby *sb, int listener)
{
	unsigned int n;
	int fd;

	/* Not for ever: there is more to do than that. */
	for (n = 0; n < 16; n++) {
		fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (fd < 0)
			break;
		take(sb, fd);
	}
	kc_session_tell(sb);
}
