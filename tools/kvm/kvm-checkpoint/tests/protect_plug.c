// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the guest sends and the kernel holds back, see protect_plug.c and net_unplug.c: with a kernel
 * that is made up, as few have all that it takes.  And what of the true one needs no more than IFB.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_tun.h>
#include <linux/pkt_sched.h>
#include <net/if.h>
#include <netlink/errno.h>
#include <netlink/route/classifier.h>
#include <netlink/route/cls/u32.h>
#include <netlink/route/link.h>
#include <netlink/route/qdisc.h>
#include <netlink/socket.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fake_plug.h"
#include "protecting.h"
#include "protect_tests.h"

#define TAPS	"[{\"card\": \"net0\", \"ifname\": \"t0\", \"mac\": \"02:00:00:00:00:01\", \"why\": \"Vhost is not supported\"}]"

/* Of the standby */
#define UNHELD "is not failed over to, unless told to by promote-anyway"

static volatile struct fake_plug *kernel;

static void until(bool (*is_so)(void), const char *what)
{
	uint64_t end = kc_now_us() + LIMIT_US;

	while (!is_so()) {
		CHECK(kc_now_us() < end, "never: %s", what);
		step(&qemu, 1);
	}
}

static unsigned int wanted;

static bool is_released(void)
{
	/* If the guest sends something it does so all the time */
	kernel->sent += !!kernel->sent;
	return kernel->releases >= wanted;
}

static void until_released_more(unsigned int n)
{
	wanted = kernel->releases + n;
	until(is_released, "packets leave");
}

static bool is_removed(void)
{
	return kernel->removed + kernel->dropped && kernel->first == kernel->next;
}

static void make_kernel(void)
{
	int fd = open(path_of("kernel"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	CHECK(fd >= 0 && !ftruncate(fd, sizeof(*kernel)), "no file");
	kernel = mmap(NULL, sizeof(*kernel), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(kernel != MAP_FAILED, "no memory");
	close(fd);
	setenv(FAKE_PLUG, path_of("kernel"), 1);
}

static void begin(void)
{
	make_kernel();
	qemu.taps = TAPS;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	serve_until_log("protected since");
	until_released_more(3);
	qemu.released_all = 0;
	kernel->removed = 0;
}

static void finish(void)
{
	int rc;

	kill(qemu.client, SIGTERM);
	rc = serve();
	CHECK(!rc, "it ends with %d", rc);
	CHECK(!kernel->misused, "the kernel is told what makes no sense");
	stop_standby(SIGTERM);
}

static void kill_client(void)
{
	kill(qemu.client, SIGKILL);
	CHECK(waitpid(qemu.client, NULL, 0) == qemu.client, "it does not die");
	be_qemu_for(100);
}

/* As long as nothing is acknowledged nothing leaves; and at its end all does, before it ends. */
void test_plug(void)
{
	uint64_t left;

	begin();
	kernel->sent = 1;
	until_released_more(3);
	freeze(standby);
	/* An acknowledgement may be under way */
	be_qemu_for(100);
	left = kernel->left;
	kernel->sent += 1000;
	be_qemu_for(300);
	CHECK(kernel->left == left && kernel->left < kernel->sent, "packets leave too soon");
	kill(standby, SIGCONT);
	until_released_more(2);
	CHECK(kernel->left > left, "none leave");
	finish();
	CHECK(kernel->removed == 1 && !kernel->dropped && kernel->first == kernel->next &&
	      kernel->left == kernel->sent, "something is still held");
}

/* Who guards the packets lives on, and does what QEMU says at its limit */
void test_plug_killed(void)
{
	begin();
	kernel->sent = 1;
	kill_client();
	CHECK(kernel->first < kernel->next && !kernel->removed && !kernel->dropped,
	      "packets leave as it dies");
	let_go(&qemu);
	until(is_removed, "the guard lets go");
	CHECK(kernel->left == kernel->sent && !kernel->dropped, "packets are dropped");
	stop_standby(SIGTERM);
}

void test_plug_qemu_dies(void)
{
	begin();
	kernel->sent = 1;
	kill_client();
	die(&qemu);
	until(is_removed, "the guard lets go");
	CHECK(kernel->dropped == 1 && kernel->left < kernel->sent, "packets leave that no epoch knows of");
	stop_standby(SIGTERM);
}

/* Another one goes on with what is held */
void test_plug_restarted(void)
{
	begin();
	kernel->sent = 1;
	kill_client();
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	until_released_more(3);
	CHECK(kernel->adds >= 2 && !kernel->removed && !kernel->dropped && !qemu.released_all &&
	      !log_has(UNHELD), "what was held was let go");
	finish();
}

/* Somebody has let it go in between: then QEMU knows less than clients do */
void test_plug_unplugged(void)
{
	begin();
	kill_client();
	kernel->first = 0;
	kernel->next = 0;
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	serve_until_log(UNHELD);
	until_released_more(3);
	finish();
}

/* While it runs: the kernel says so, the standby is told, and all is begun anew */
void test_plug_removed(void)
{
	begin();
	kernel->mark_fails = ENODEV;
	serve_until_log(UNHELD);
	until_released_more(3);
	CHECK(qemu.attaches == 2, "it begins %u times", qemu.attaches);
	finish();
}

/* The next one cannot hold them: what is held stays until QEMU's limit, as the standby may take over */
void test_plug_refused_later(void)
{
	begin();
	kernel->sent = 1;
	kill_client();
	kernel->add_fails = EPERM;
	must_fail(protect(CHECKED, spec()), "by the kernel as the kernel is told to.  Say --net pass");
	CHECK(qemu.holds && !qemu.released_all && !kernel->removed && !kernel->dropped &&
	      kernel->left < kernel->sent, "packets leave, and the standby's epoch does not know of them");
	let_go(&qemu);
	until(is_removed, "the guard lets go");
	CHECK(!kernel->dropped, "packets are dropped");
	stop_standby(SIGTERM);
}

/* QEMU has got what it is to tell the guard by, and says nothing any more */
static const char *guards_nothing(struct qemu *q, const char *command)
{
	(void)q;
	return strcmp(command, GUARD) ? NULL : silent;
}

void test_plug_guard_unheard(void)
{
	make_kernel();
	qemu.taps = TAPS;
	qemu.hook = guards_nothing;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec(), "--qemu-timeout", "10s"), "QEMU does not answer to " GUARD);
	CHECK(!kernel->adds, "it holds packets, and nobody would let them go");
	stop_standby(SIGTERM);
}

/* The guard cannot: who has to see to it is told */
void test_plug_guard_fails(void)
{
	begin();
	kernel->sent = 1;
	kernel->remove_fails = EPERM;
	finish();
	CHECK(log_has("see to it by kvm-checkpoint unplug"), "it says nothing");
	CHECK(!kernel->removed && kernel->first < kernel->next, "it has removed it");
}

/* The kernel takes longer for it than the standby would wait for a primary that says nothing */
#define LONG_MS	6000

void test_plug_guard_slow(void)
{
	make_kernel();
	qemu.taps = TAPS;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--fence", fence(), "--timeout", "3s", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	serve_until_log("protected since");
	until_released_more(3);
	kernel->remove_ms = LONG_MS;
	kernel->mark_fails = ENODEV;
	until(is_removed, "the guard lets go");
	kernel->remove_ms = 0;
	until_released_more(3);
	CHECK(!exists(path_of("fenced")) && !log_has("failing over"),
	      "the host of a guest that runs is fenced");
	finish();
}

/*
 * Its owner stops the guest when an epoch is under way, which has the mark: what it has sent since
 * leaves, too, although nothing of the guest changes any more.
 */
#define LAST_WORDS	1000

static bool is_frozen, is_paused;

static const char *owner_stops(struct qemu *q, const char *command)
{
	if (strcmp(command, STOP) || is_paused || !kernel->releases)
		return NULL;
	if (is_frozen) {
		kernel->sent = LAST_WORDS;
		q->running = false;
		is_paused = true;
	} else if (!kernel->has_mark && q->released == q->packets) {
		/* All is acknowledged, so that this one and the next are sent */
		freeze(standby);
		is_frozen = true;
	}
	return NULL;
}

static bool was_paused(void)
{
	return is_paused;
}

static bool has_all_left(void)
{
	return kernel->left >= LAST_WORDS;
}

void test_plug_paused(void)
{
	unsigned int releases;

	begin();
	qemu.hook = owner_stops;
	until(was_paused, "the guest is paused");
	CHECK(kernel->left < LAST_WORDS, "packets leave too soon");
	kill(standby, SIGCONT);
	until(has_all_left, "what it has sent before leaves");
	/* And there are no epochs for nothing after that */
	releases = kernel->releases;
	be_qemu_for_epochs(10);
	CHECK(kernel->releases == releases, "an idle guest has epochs that say nothing");
	finish();
}

/* --- The true one ------------------------------------------------------------ */

static char mac[18];
static struct nl_sock *sk;
static int tap;

static void write_proc(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		SKIP("%s cannot be written: %s", path, strerror(errno));
	close(fd);
}

/* A network namespace of our own, and in it a tap device that ends with us */
static void make_tap(void)
{
	struct ifreq r = { .ifr_flags = IFF_TAP | IFF_NO_PI }, lo = { .ifr_name = "lo" };
	int fd, s, uid = getuid();
	const uint8_t *m = (const uint8_t *)r.ifr_hwaddr.sa_data;
	char text[40];

	if (unshare(CLONE_NEWNET)) {
		if (unshare(CLONE_NEWUSER | CLONE_NEWNET))
			SKIP("no network namespace: %s", strerror(errno));
		snprintf(text, sizeof(text), "0 %d 1", uid);
		write_proc("/proc/self/uid_map", text);
	}
	strcpy(r.ifr_name, "t0");
	fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &r))
		SKIP("no tap device: %s", strerror(errno));
	tap = if_nametoindex("t0");
	CHECK(tap && !ioctl(fd, SIOCGIFHWADDR, &r), "there is none");
	snprintf(mac, sizeof(mac), "%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5]);
	s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	lo.ifr_flags = IFF_UP;
	CHECK(!ioctl(s, SIOCSIFFLAGS, &lo), "no loopback: %s", strerror(errno));
	close(s);
	sk = nl_socket_alloc();
	CHECK(sk && !nl_connect(sk, NETLINK_ROUTE), "no netlink");
}

/* As one that was left; its name */
static const char *make_ifb(void)
{
	struct rtnl_link *link = rtnl_link_alloc();
	static char name[IFNAMSIZ];

	snprintf(name, sizeof(name), "kc%dp0", tap);
	rtnl_link_set_name(link, name);
	if (rtnl_link_set_type(link, "ifb") || rtnl_link_add(sk, link, NLM_F_CREATE | NLM_F_EXCL))
		SKIP("the kernel has no IFB");
	rtnl_link_put(link);
	return name;
}

/* Or that there is one already: -NLE_EXIST */
static int add_ingress(void)
{
	struct rtnl_qdisc *q = rtnl_qdisc_alloc();
	int rc;

	rtnl_tc_set_ifindex(TC_CAST(q), tap);
	rtnl_tc_set_parent(TC_CAST(q), TC_H_INGRESS);
	rtnl_tc_set_handle(TC_CAST(q), TC_HANDLE(0xffff, 0));
	CHECK(!rtnl_tc_set_kind(TC_CAST(q), "ingress"), "no ingress");
	rc = rtnl_qdisc_add(sk, q, NLM_F_CREATE | NLM_F_EXCL);
	rtnl_qdisc_put(q);
	return rc;
}

/* Somebody's, as to limit bandwidth; or that there is one already */
static int add_filter(void)
{
	struct rtnl_cls *cls = rtnl_cls_alloc();
	int rc;

	rtnl_tc_set_ifindex(TC_CAST(cls), tap);
	rtnl_tc_set_parent(TC_CAST(cls), TC_HANDLE(0xffff, 0));
	rtnl_cls_set_prio(cls, 7);
	rtnl_cls_set_protocol(cls, ETH_P_ALL);
	CHECK(!rtnl_tc_set_kind(TC_CAST(cls), "u32") && !rtnl_u32_add_key_uint32(cls, 0, 0, 0, 0) &&
	      !rtnl_u32_set_classid(cls, TC_HANDLE(1, 1)) && !rtnl_u32_set_cls_terminal(cls), "no u32");
	rtnl_u32_set_handle(cls, 0x800, 0, 0x800);
	rc = rtnl_cls_add(sk, cls, NLM_F_CREATE | NLM_F_EXCL);
	rtnl_cls_put(cls);
	return rc;
}

static void make_somebodys(void)
{
	if (add_ingress() || add_filter())
		SKIP("the kernel has no ingress, or no u32");
	CHECK(add_filter() == -NLE_EXIST, "there can be two of it: this test shows nothing");
}

/* One that was left, and in the same place something of somebody's */
void test_unplug_others(void)
{
	const char *ifb;

	make_tap();
	ifb = make_ifb();
	make_somebodys();
	CHECK(!run("unplug", "t0", NULL), "it fails");
	CHECK(!if_nametoindex(ifb), "it leaves the IFB device");
	CHECK(add_filter() == -NLE_EXIST, "it has removed a filter that is somebody's");
}

/* All of it is ours; a stranger has the name of the lock, for ever; and a longer name is another one */
void test_unplug_locked(void)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	const char *ifb;
	int fd, n;

	make_tap();
	ifb = make_ifb();
	if (add_ingress())
		SKIP("the kernel has no ingress");
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	n = snprintf(sun.sun_path + 1, sizeof(sun.sun_path) - 1, "kvm-checkpoint-tap-%d", tap);
	CHECK(!bind(fd, (struct sockaddr *)&sun, offsetof(struct sockaddr_un, sun_path) + 1 + n),
	      "no lock");
	CHECK(run("unplug", "t0-with-a-name-too-long", NULL) == 1 &&
	      log_has("there is no device t0-with-a-name-too-long"), "it takes it for another one");
	CHECK(!run("unplug", "t0", NULL), "it fails");
	CHECK(!if_nametoindex(ifb) && !add_ingress(), "it leaves something");
}

/* Where somebody has to do with what comes from the device it is left as it is */
void test_plug_refused_ingress(void)
{
	char taps[200], name[IFNAMSIZ];

	make_tap();
	make_somebodys();
	snprintf(name, sizeof(name), "kc%dp0", tap);
	snprintf(taps, sizeof(taps),
		 "[{\"card\": \"net0\", \"ifname\": \"t0\", \"mac\": \"%s\", \"why\": \"Vhost is not supported\"}]",
		 mac);
	qemu.taps = taps;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec()), "t0 has an ingress queueing discipline already");
	CHECK(!if_nametoindex(name), "it leaves an IFB device");
	CHECK(add_filter() == -NLE_EXIST, "it has removed a filter that is somebody's");
	stop_standby(SIGTERM);
}
