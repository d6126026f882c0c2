// SPDX-License-Identifier: GPL-2.0-only
/*
 * The guest's database: SQLite, on a file system on a disk of its own, behind a server.
 *
 * Every entry is a transaction.  It is answered when SQLite says that it is on the disk; a client
 * that got the answer may rely on it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <sqlite3.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ledger.h"

static sqlite3 *db;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/*
 * Each transaction changes one of these rows as well, which have a page each: what is on the disk has to
 * be what is known here, in memory, or the two are not of the same moment.
 */
#define STAMPS	50
static long stamps[STAMPS], newest;

/* One row of numbers into @n */
static int numbers(const char *sql, int client, long *n, int columns)
{
	sqlite3_stmt *st;
	int rc, i;

	if (sqlite3_prepare_v2(db, sql, -1, &st, NULL) != SQLITE_OK)
		return SQLITE_ERROR;
	sqlite3_bind_int(st, 1, client);
	rc = sqlite3_step(st);
	for (i = 0; rc == SQLITE_ROW && i < columns; i++)
		n[i] = sqlite3_column_int64(st, i);
	sqlite3_finalize(st);
	return rc == SQLITE_ROW ? SQLITE_OK : rc;
}

/* A statement with two numbers */
static bool change(const char *sql, long a, long b)
{
	sqlite3_stmt *st;
	int rc;

	if (sqlite3_prepare_v2(db, sql, -1, &st, NULL) != SQLITE_OK)
		return false;
	sqlite3_bind_int64(st, 1, a);
	sqlite3_bind_int64(st, 2, b);
	rc = sqlite3_step(st);
	sqlite3_finalize(st);
	return rc == SQLITE_DONE;
}

static bool insert(int client, long nr)
{
	long stamp = newest + 1, id = stamp * 37 % STAMPS;

	/* An entry that is there twice would be seen: nothing forbids it */
	if (!change("BEGIN", 0, 0) ||
	    !change("INSERT INTO entries VALUES (?, ?, randomblob(300))", client, nr) ||
	    !change("UPDATE stamps SET stamp = ? WHERE id = ?", stamp, id) ||
	    !change("COMMIT", 0, 0)) {
		change("ROLLBACK", 0, 0);
		return false;
	}
	newest = stamp;
	stamps[id] = stamp;
	return true;
}

/* EXTRA: what is committed outlives a loss of power; FULL does not sync that its journal is gone */
static bool open_db(void)
{
	return sqlite3_open("/db/ledger", &db) == SQLITE_OK &&
	       sqlite3_exec(db, "PRAGMA synchronous = EXTRA", NULL, NULL, NULL) == SQLITE_OK;
}

/* Of a guest that was booted before: what is on its disk is all that it knows */
static bool know_db(void)
{
	long id;

	for (id = 0; id < STAMPS; id++) {
		if (numbers("SELECT stamp FROM stamps WHERE id = ?", id, &stamps[id], 1) != SQLITE_OK)
			return false;
		if (stamps[id] > newest)
			newest = stamps[id];
	}
	return true;
}

static bool make_db(void)
{
	long id;

	if (!open_db())
		return false;
	if (know_db())
		return true;
	if (!change("BEGIN", 0, 0) ||
	    !change("CREATE TABLE entries (client INTEGER, nr INTEGER, filling BLOB)", 0, 0) ||
	    !change("CREATE TABLE stamps (id INTEGER PRIMARY KEY, stamp INTEGER, filling BLOB)", 0, 0))
		return false;
	for (id = 0; id < STAMPS; id++) {
		if (!change("INSERT INTO stamps VALUES (?, ?, randomblob(3500))", id, 0))
			return false;
	}
	return change("COMMIT", 0, 0);
}

/* Nothing of it is in memory any more, so that what is read then comes from the disk */
static bool open_from_disk(void)
{
	sqlite3_close(db);
	return !umount("/db") && !mount(LEDGER_DISK, "/db", "ext4", 0, NULL) && open_db();
}

static void check(int fd)
{
	sqlite3_stmt *st;
	long id, n = -1;

	if (!open_from_disk()) {
		dprintf(fd, "check it cannot be opened again: %s\n", strerror(errno));
		return;
	}
	for (id = 0; id < STAMPS; id++) {
		if (numbers("SELECT stamp FROM stamps WHERE id = ?", id, &n, 1) == SQLITE_OK &&
		    n == stamps[id])
			continue;
		dprintf(fd, "check stamp %ld is %ld on the disk, and %ld in memory: %s\n", id, n,
			stamps[id], sqlite3_errmsg(db));
		return;
	}
	if (sqlite3_prepare_v2(db, "PRAGMA integrity_check(1)", -1, &st, NULL) != SQLITE_OK ||
	    sqlite3_step(st) != SQLITE_ROW)
		dprintf(fd, "check %s\n", sqlite3_errmsg(db));
	else
		dprintf(fd, "check %s\n", sqlite3_column_text(st, 0));
	sqlite3_finalize(st);
}

static void *serve(void *arg)
{
	int fd = (int)(long)arg, client;
	FILE *f = fdopen(fd, "r");
	long nr, n[3];
	char line[100];

	while (f && fgets(line, sizeof(line), f)) {
		pthread_mutex_lock(&lock);
		if (sscanf(line, "put %d %ld", &client, &nr) == 2) {
			if (insert(client, nr))
				dprintf(fd, "ok %d %ld\n", client, nr);
			else
				dprintf(fd, "error %s\n", sqlite3_errmsg(db));
		} else if (sscanf(line, "have %d", &client) == 1) {
			if (numbers("SELECT count(*), count(DISTINCT nr), ifnull(max(nr), 0) FROM entries WHERE client = ?",
				    client, n, 3) == SQLITE_OK)
				dprintf(fd, "have %d %ld %ld %ld\n", client, n[0], n[1], n[2]);
			else
				dprintf(fd, "error %s\n", sqlite3_errmsg(db));
		} else if (!strncmp(line, "check", 5)) {
			check(fd);
		} else {
			dprintf(fd, "error what?\n");
		}
		pthread_mutex_unlock(&lock);
	}
	if (f)
		fclose(f);
	return NULL;
}

static void *listen_thread(void *arg)
{
	int listener = (int)(long)arg, fd, one = 1;
	pthread_t thread;

	for (;;) {
		fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (fd < 0)
			continue;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		if (pthread_create(&thread, NULL, serve, (void *)(long)fd))
			close(fd);
		else
			pthread_detach(thread);
	}
	return NULL;
}

const char *ledger_start(void)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_port = htons(LEDGER_PORT) };
	int listener, one = 1;
	pthread_t thread;

	if (!bring_up("lo", "127.0.0.1") || !bring_up("eth0", LEDGER_GUEST))
		return "network";
	mkdir("/db", 0700);
	if (mount(LEDGER_DISK, "/db", "ext4", 0, NULL))
		return "mount of the database's disk";
	if (!make_db())
		return "database";
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (listener < 0 || bind(listener, (struct sockaddr *)&sin, sizeof(sin)) ||
	    listen(listener, 10) ||
	    pthread_create(&thread, NULL, listen_thread, (void *)(long)listener))
		return "server";
	return NULL;
}
