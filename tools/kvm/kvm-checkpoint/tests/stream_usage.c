// SPDX-License-Identifier: GPL-2.0-only
/*
 * Command lines with a mistake: status 2, and a message that says what is wrong and where to look.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sim.h"
#include "stream_tests.h"

#define LISTEN "standby", "--listen"
#define TO "protect", "--qmp", "q", "--to"

static const struct {
	const char *args[10], *says;
} mistakes[] = {
	{ { "bogus" }, "there is no command bogus" },
	{ { "list" }, "list: DIR is missing" },
	{ { "list", "a", "b" }, "list: there is an argument too many: b" },
	{ { "list", "--bogus", "a" }, "list: unrecognized option '--bogus'" },
	{ { "verify" }, "verify: DIR is missing" },
	{ { "verify", "a", "b" }, "verify: there is an argument too many: b" },
	{ { "verify", "--json", "a" }, "verify: unrecognized option '--json'" },
	{ { "restore" }, "restore: DIR is missing" },
	{ { "restore", "--epoch" }, "restore: option '--epoch' requires an argument" },
	{ { "restore", "--epoch", "0", "a" }, "restore: --epoch does not take 0" },
	{ { "restore", "--load-timeout", "x", "a" }, "restore: --load-timeout does not take x" },
	{ { "status" }, "status: SOCKET is missing" },
	{ { "status", "--prometheus" }, "status: SOCKET is missing" },
	{ { "status", "a", "b", "c" }, "status: one SOCKET" },
	{ { "status", "--json", "a", "promote" }, "status: one SOCKET" },
	{ { "protect" }, "protect: --qmp is missing" },
	{ { "protect", "--bogus" }, "protect: unrecognized option '--bogus'" },
	{ { "protect", "--qmp", "q" }, "protect: --to is missing" },
	{ { TO, "d", "x" }, "protect: there is an argument too many" },
	{ { TO, "d", "--interval", "x" }, "protect: --interval needs a time" },
	{ { TO, "tcp:nowhere", "--insecure" }, "nowhere is not HOST:PORT" },
	{ { TO, "tcp::7070", "--insecure" }, ":7070 is not HOST:PORT" },
	{ { TO, "tcp:::1:7070", "--insecure" }, "write IPv6 addresses in brackets" },
	{ { TO, "tcp:localhost:", "--insecure" }, "localhost: is not HOST:PORT" },
	{ { TO, "tcp:127.0.0.1:70000", "--insecure" }, "ports are numbers up to 65535" },
	{ { TO, "tcp:127.0.0.1:no-such", "--insecure" }, "127.0.0.1:no-such: no such port" },
	{ { TO, "tcp:192.0.2.1:7", "--insecure" }, "--insecure is only for loopback" },
	{ { TO, "tcp:localhost:7070" }, "no key: make one with" },
	{ { TO, "tcp:localhost:7070", "--psk-file", "nokey" }, "cannot read nokey" },
	{ { TO, "tcp:localhost:7", "--psk-file", psk, "--psk-identity", "x" }, "has no key of x" },
	{ { "standby", "--bogus" }, "standby: unrecognized option '--bogus'" },
	{ { "standby", "--no-fence" }, "--listen HOST:PORT is missing" },
	{ { LISTEN, "127.0.0.1:0", "--insecure" }, "give --fence COMMAND" },
	{ { LISTEN, "nowhere", "--no-fence", "--insecure" }, "nowhere is not HOST:PORT" },
	{ { LISTEN, ":70000", "--no-fence", "--insecure" }, "ports are numbers up to 65535" },
	{ { LISTEN, "0.0.0.0:0", "--no-fence", "--insecure" }, "--insecure is only for loopback" },
	{ { LISTEN, ":0", "--no-fence", "--insecure" }, "--insecure is only for loopback" },
	{ { LISTEN, "127.0.0.1:0", "--no-fence" }, "no key: make one with" },
	{ { LISTEN, "127.0.0.1:0", "--no-fence", "--psk-file", "nokey" }, "cannot read nokey" },
};

void test_usage(void)
{
	static const char name[] = "kvm-checkpoint: ";
	const char *argv[12] = { program };
	char *text;
	size_t i, len;
	pid_t pid;
	int rc;

	for (i = 0; i < sizeof(mistakes) / sizeof(mistakes[0]); i++) {
		memcpy(argv + 1, mistakes[i].args, sizeof(mistakes[i].args));
		unlink(path_of("log"));
		pid = spawn(argv, 0);
		rc = reap(&pid);
		read_all(path_of("log"), (uint8_t **)&text, &len);
		text[len] = '\0';
		CHECK(rc == 2, "\"%s\": it ends with %d, not 2, and says \"%s\"",
		      mistakes[i].says, rc, text);
		CHECK(!strncmp(text, name, strlen(name)) && strstr(text, mistakes[i].says),
		      "it does not say \"%s\", but \"%s\"", mistakes[i].says, text);
		free(text);
	}
	CHECK(!run("--version", NULL) && !run("--help", NULL), "--version and --help fail");
}
