// SPDX-License-Identifier: GPL-2.0-only
/*
 * Commands as the user gives them: split into arguments, placeholders replaced, and checked before
 * they are needed.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "launch.h"

void kc_free_argv(char **argv)
{
	char **a;

	for (a = argv; a && *a; a++)
		free(*a);
	free(argv);
}

char **kc_split(const char *s)
{
	/* No more arguments than characters. */
	char **argv = calloc(strlen(s) + 1, sizeof(*argv)), *word = malloc(strlen(s) + 1);
	size_t n = 0, len = 0;
	bool in_word = false;
	char quote = 0;

	if (!argv || !word)
		goto fail;
	for (;; s++) {
		if (*s && quote) {
			if (*s == quote)
				quote = 0;
			else if (*s == '\\' && quote == '"' && (s[1] == '"' || s[1] == '\\'))
				word[len++] = *++s;
			else
				word[len++] = *s;
			continue;
		}
		if (*s == '\'' || *s == '"') {
			quote = *s;
			in_word = true;
		} else if (*s == '\\' && s[1]) {
			word[len++] = *++s;
			in_word = true;
		} else if (*s && !strchr(" \t\n", *s)) {
			word[len++] = *s;
			in_word = true;
		} else {
			if (in_word) {
				argv[n] = strndup(word, len);
				if (!argv[n++])
					goto fail;
				len = 0;
				in_word = false;
			}
			if (!*s)
				break;
		}
	}
	if (quote || !n)
		goto fail;
	free(word);
	return argv;
fail:
	free(word);
	kc_free_argv(argv);
	return NULL;
}

/* What {name} stands for, into buf; false if there is none. */
static bool placeholder(const struct kc_launch *l, const char *name, size_t n, char *buf,
			size_t size)
{
	const char *v = NULL;
	unsigned long i = KC_MAX_BLOCKS;
	bool is_size = n > 4 && !strncmp(name, "size", 4);
	char *end;

	*buf = '\0';
	if (n == 5 && !strncmp(name, "state", n)) {
		v = l->state ? l->state : "";
	} else if (n == 5 && !strncmp(name, "epoch", n)) {
		snprintf(buf, size, "%" PRIu64, l->epoch);
		return true;
	} else if (n > 4 && !strncmp(name, "ram:", 4)) {
		if (!l->guest)
			return true;
		for (i = 0; i < l->guest->nr_blocks; i++) {
			if (strlen(l->guest->blocks[i].name) == n - 4 &&
			    !strncmp(l->guest->blocks[i].name, name + 4, n - 4))
				break;
		}
	} else if (n > 4 && !strncmp(name, "disk", 4) && name[4] >= '0' && name[4] <= '9') {
		i = strtoul(name + 4, &end, 10);
		if (end != name + n)
			return false;
		if (!l->guest)
			return i < KC_MAX_DISKS;
		if (i < l->guest->nr_disks)
			v = l->disks[i];
		i = KC_MAX_BLOCKS;
	} else if ((is_size || (n > 3 && !strncmp(name, "ram", 3))) &&
		   name[is_size ? 4 : 3] >= '0' && name[is_size ? 4 : 3] <= '9') {
		i = strtoul(name + (is_size ? 4 : 3), &end, 10);
		if (end != name + n)
			return false;
		if (!l->guest)
			return i < KC_MAX_BLOCKS;
	}
	if (l->guest && i < l->guest->nr_blocks) {
		if (is_size) {
			snprintf(buf, size, "%" PRIu64, l->guest->blocks[i].npages * KC_PAGE_SIZE);
			return true;
		}
		v = l->ram[i];
	}
	if (!v || strlen(v) >= size)
		return false;
	strcpy(buf, v);
	return true;
}

/* An argument with its placeholders replaced; malloc()ed. */
char *kc_expand(const struct kc_launch *l, const char *arg, struct kc_err *err)
{
	char value[4096], *out = NULL;
	const char *p, *close;
	size_t len;
	FILE *f = open_memstream(&out, &len);
	bool ok = f;

	for (p = arg; ok && *p; p++) {
		/* JSON has braces too: only a lower-case word in them is one of ours. */
		close = *p == '{' && p[1] >= 'a' && p[1] <= 'z' ? strchr(p, '}') : NULL;
		if (!close) {
			fputc(*p, f);
			continue;
		}
		ok = placeholder(l, p + 1, close - p - 1, value, sizeof(value));
		if (!ok)
			kc_fail(err, EINVAL,
				"\"%s\": there is no %.*s; known are {ramN}, {ram:NAME}, {sizeN}, {diskN}, {state} and {epoch}%s",
				arg, (int)(close - p + 1), p,
				l->guest ? ", of blocks and disks that the guest has" : "");
		fputs(value, f);
		p = close;
	}
	if (f && fclose(f))
		ok = false;
	if (ok)
		return out;
	free(out);
	return NULL;
}

int kc_launch_check(const struct kc_launch *l, struct kc_err *err)
{
	char **a, *s;

	for (a = l->argv; *a; a++) {
		s = kc_expand(l, *a, err);
		if (!s)
			return -EINVAL;
		free(s);
	}
	return 0;
}

/* Which block's path {name} stands for, or -1 */
static int block_of(const struct kc_launch *l, const char *name, size_t n)
{
	char path[4096];
	uint32_t i;

	if (strncmp(name, "ram", 3) || !placeholder(l, name, n, path, sizeof(path)))
		return -1;
	for (i = 0; i < l->guest->nr_blocks; i++) {
		if (!strcmp(path, l->ram[i]))
			return i;
	}
	return -1;
}

/* In a buffer that has room for it */
static void replace(char *s, const char *what, const char *by)
{
	size_t n = strlen(what), m = strlen(by);

	for (; (s = strstr(s, what)); s += m) {
		memmove(s + m, s + n, strlen(s + n) + 1);
		memcpy(s, by, m);
	}
}

char *kc_make_private(const char *arg)
{
	/* What is locked or allocated ahead would be a copy of it all; spelled as QEMU takes it */
	static const char * const from[][2] = {
		{ "share=on", "share=off" }, { "share=yes", "share=off" },
		{ "share=true", "share=off" }, { "share=y", "share=off" },
		{ "\"share\":true", "\"share\":false" }, { "\"share\": true", "\"share\":false" },
		{ "prealloc=on", "prealloc=off" }, { "prealloc=yes", "prealloc=off" },
		{ "prealloc=true", "prealloc=off" }, { "prealloc=y", "prealloc=off" },
		{ "\"prealloc\":true", "\"prealloc\":false" },
		{ "\"prealloc\": true", "\"prealloc\":false" }, { "mem-lock=on", "mem-lock=off" },
	};
	char *s = malloc(2 * strlen(arg) + 1);
	unsigned int i;

	if (!s)
		return NULL;
	strcpy(s, arg);
	for (i = 0; i < sizeof(from) / sizeof(from[0]); i++)
		replace(s, from[i][0], from[i][1]);
	return s;
}

bool kc_launch_names_epoch(const struct kc_launch *l)
{
	char **a;

	for (a = l->argv; *a; a++) {
		if (strstr(*a, "{state}") || strstr(*a, "{epoch}"))
			return true;
	}
	return false;
}

bool kc_launch_has_ram(const struct kc_launch *l)
{
	char **a;

	for (a = l->argv; *a; a++) {
		if (strstr(*a, "{ram"))
			return true;
	}
	return false;
}

int kc_launch_check_blocks(const struct kc_launch *l, struct kc_err *err)
{
	bool used[KC_MAX_BLOCKS] = { false };
	const char *p, *close;
	uint32_t i;
	char **a;
	int b;

	for (a = l->argv; *a; a++) {
		for (p = strchr(*a, '{'); p; p = strchr(p + 1, '{')) {
			close = strchr(p, '}');
			b = close ? block_of(l, p + 1, close - p - 1) : -1;
			if (b >= 0)
				used[b] = true;
		}
	}
	for (i = 0; i < l->guest->nr_blocks; i++) {
		if (!used[i])
			return kc_fail(err, EINVAL,
				       "the standby's QEMU command does not use block %s of the guest's RAM, by {ram%u} or {ram:%s}: the guest would go on without that memory",
				       l->guest->blocks[i].name, i, l->guest->blocks[i].name);
	}
	for (i = 0; i < l->guest->nr_disks; i++) {
		char name[20];

		snprintf(name, sizeof(name), "{disk%u}", i);
		for (a = l->argv; *a && !strstr(*a, name); a++)
			;
		if (!*a)
			return kc_fail(err, EINVAL,
				       "the standby's QEMU command does not use disk %s of the guest, by %s",
				       l->guest->disks[i].name, name);
	}
	return 0;
}

static int can_run(const char *path)
{
	struct stat st;

	if (stat(path, &st))
		return -errno;
	if (!S_ISREG(st.st_mode))
		return -EACCES;
	return access(path, X_OK) ? -errno : 0;
}

/* Where execvp() looks */
int kc_can_run(const char *file, struct kc_err *err)
{
	const char *dir = getenv("PATH"), *end;
	int rc = -ENOENT, found;
	char path[4096];

	if (strchr(file, '/'))
		rc = can_run(file);
	for (; !strchr(file, '/') && dir && rc; dir = *end ? end + 1 : NULL) {
		end = strchrnul(dir, ':');
		snprintf(path, sizeof(path), "%.*s/%s", (int)(end - dir), dir, file);
		found = can_run(path);
		if (found != -ENOENT && found != -ENOTDIR)
			rc = found;
	}
	return rc ? kc_fail(err, -rc, "cannot run %s: %s", file, strerror(-rc)) : 0;
}
