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

static int insert(int client, long nr)
{
	sqlite3_stmt *st;
	int rc;

	/* Twice would be seen: nothing forbids it */
	if (sqlite3_prepare_v2(db, "INSERT INTO entries VALUES (?, ?, randomblob(300))", -1, &st,
			       NULL) != SQLITE_OK)
		return SQLITE_ERROR;
	sqlite3_bind_int(st, 1, client);
	sqlite3_bind_int64(st, 2, nr);
	rc = sqlite3_step(st);
	sqlite3_finalize(st);
	return rc == SQLITE_DONE ? SQLITE_OK : rc;
}

static void check(int fd)
{
	sqlite3_stmt *st;

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
			if (insert(client, nr) == SQLITE_OK)
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
	if (sqlite3_open("/db/ledger", &db) != SQLITE_OK ||
	    sqlite3_exec(db, "PRAGMA synchronous = FULL; CREATE TABLE IF NOT EXISTS entries (client INTEGER, nr INTEGER, filling BLOB);",
			 NULL, NULL, NULL) != SQLITE_OK)
		return "database";
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (listener < 0 || bind(listener, (struct sockaddr *)&sin, sizeof(sin)) ||
	    listen(listener, 10) ||
	    pthread_create(&thread, NULL, listen_thread, (void *)(long)listener))
		return "server";
	return NULL;
}
