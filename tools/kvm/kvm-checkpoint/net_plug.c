// SPDX-License-Identifier: GPL-2.0-only
#include <errno.h>
#include <limits.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <linux/pkt_sched.h>
#include <linux/tc_act/tc_mirred.h>
#include <netlink/errno.h>
#include <netlink/msg.h>
#include <netlink/route/act/mirred.h>
#include <netlink/route/classifier.h>
#include <netlink/route/cls/matchall.h>
#include <netlink/route/link.h>
#include <netlink/route/qdisc.h>
#include <netlink/route/qdisc/plug.h>
#include <netlink/socket.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "net_plug.h"

/* As QEMU's, of all cards together */
#define MAX_BYTES	(256 << 20)

/* The first filter counts, so that a newer one has to have a smaller number */
#define PRIORITY	40000u
#define MAX_NR		39999u

#define HANDLE		TC_HANDLE(1, 0)
#define INGRESS		TC_HANDLE(0xffff, 0)

/* What has been let go is sent soon, however busy the machine is */
#define DRAIN_MS	5000u

static const struct { int nl, error; } errors[] = {
	{ NLE_PERM, EPERM }, { NLE_NOACCESS, EPERM }, { NLE_EXIST, EEXIST }, { NLE_NODEV, ENODEV },
	{ NLE_OBJ_NOTFOUND, ENOENT }, { NLE_OPNOTSUPP, EOPNOTSUPP }, { NLE_BUSY, EBUSY },
	{ NLE_NOMEM, ENOMEM }, { NLE_INVAL, EINVAL },
};

static int error_of(int nl)
{
	unsigned int i;

	for (i = 0; i < sizeof(errors) / sizeof(errors[0]); i++) {
		if (errors[i].nl == abs(nl))
			return errors[i].error;
	}
	return EIO;
}

static int fail(struct kc_err *err, int nl, const char *what, const char *ifname)
{
	int error = error_of(nl);

	if (error == EPERM)
		return kc_fail(err, error, "%s for %s needs CAP_NET_ADMIN", what, ifname);
	return kc_fail(err, error, "%s for %s is refused by the kernel (%s)", what, ifname,
		       nl_geterror(nl));
}

int kc_plug_connect(struct nl_sock **sk, struct kc_err *err)
{
	int rc;

	*sk = nl_socket_alloc();
	if (!*sk)
		return kc_fail(err, ENOMEM, "no memory");
	rc = nl_connect(*sk, NETLINK_ROUTE);
	if (!rc)
		return 0;
	nl_socket_free(*sk);
	*sk = NULL;
	return kc_fail(err, error_of(rc), "cannot talk to the kernel about networks: %s",
		       nl_geterror(rc));
}

/*
 * What there is
 */

static int by_age(const void *a, const void *b)
{
	const struct kc_ifb *x = a, *y = b;

	return x->nr < y->nr ? -1 : x->nr > y->nr;
}

static int look(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err)
{
	struct nl_object *o;
	struct nl_cache *links;
	unsigned int nr;
	int rc, tap, end;

	p->nr_ifbs = 0;
	rc = rtnl_link_alloc_cache(sk, AF_UNSPEC, &links);
	if (rc)
		return fail(err, rc, "a list of network devices", p->ifname);
	for (o = nl_cache_get_first(links); o; o = nl_cache_get_next(o)) {
		const char *name = rtnl_link_get_name((struct rtnl_link *)o);

		end = 0;
		if (!name || sscanf(name, KC_IFB_NAME "%n", &tap, &nr, &end) != 2 || name[end] ||
		    tap != p->tap || p->nr_ifbs == KC_MAX_IFBS)
			continue;
		p->ifbs[p->nr_ifbs++] = (struct kc_ifb){
			.nr = nr, .index = rtnl_link_get_ifindex((struct rtnl_link *)o),
		};
	}
	nl_cache_free(links);
	qsort(p->ifbs, p->nr_ifbs, sizeof(p->ifbs[0]), by_age);
	return 0;
}

int kc_plug_find(struct nl_sock *sk, const char *ifname, const char *mac, struct kc_plug *p,
		 struct kc_err *err)
{
	struct rtnl_link *link;
	const char *type;
	char addr[32];
	int rc;

	*p = (struct kc_plug){ .nr_ifbs = 0 };
	snprintf(p->ifname, sizeof(p->ifname), "%s", ifname);
	/* A name that is cut might be another one's */
	rc = strlen(ifname) >= sizeof(p->ifname) ? -NLE_NODEV :
	     rtnl_link_get_kernel(sk, 0, p->ifname, &link);
	if (rc && (error_of(rc) == ENODEV || error_of(rc) == ENOENT))
		return kc_fail(err, ENODEV, "there is no device %s in this network namespace",
			       ifname);
	if (rc)
		return fail(err, rc, "a question", p->ifname);
	p->tap = rtnl_link_get_ifindex(link);
	p->newest = UINT_MAX;
	type = rtnl_link_get_type(link);
	nl_addr2str(rtnl_link_get_addr(link), addr, sizeof(addr));
	if (!type || strcmp(type, "tun"))
		rc = kc_fail(err, EINVAL, "%s is no tap device", p->ifname);
	else if (mac && strcasecmp(mac, addr))
		rc = kc_fail(err, EINVAL,
			     "%s is another device in this network namespace than QEMU's", p->ifname);
	rtnl_link_put(link);
	return rc ? rc : look(sk, p, err);
}

/* Has it an ingress queueing discipline, or a clsact one, which is in the same place? */
static bool has_ingress(struct nl_sock *sk, const struct kc_plug *p)
{
	struct nl_cache *qdiscs;
	struct rtnl_qdisc *q;

	if (rtnl_qdisc_alloc_cache(sk, &qdiscs))
		return false;
	q = rtnl_qdisc_get_by_parent(qdiscs, p->tap, TC_H_INGRESS);
	if (q)
		rtnl_qdisc_put(q);
	nl_cache_free(qdiscs);
	return q;
}

static int note_priority(struct nl_msg *msg, void *first)
{
	const struct tcmsg *t = nlmsg_data(nlmsg_hdr(msg));
	unsigned int prio = t->tcm_info >> 16;

	if (prio < *(unsigned int *)first)
		*(unsigned int *)first = prio;
	return NL_OK;
}

/* The lowest priority of a filter in it, or UINT_MAX; what they are of is nobody's business here */
static int first_filter(struct nl_sock *sk, const struct kc_plug *p, unsigned int *first)
{
	struct tcmsg t = { .tcm_family = AF_UNSPEC, .tcm_ifindex = p->tap, .tcm_parent = INGRESS };
	struct nl_cb *ours = nl_socket_get_cb(sk), *cb = nl_cb_clone(ours);
	int rc = cb ? 0 : -NLE_NOMEM;

	nl_cb_put(ours);
	*first = UINT_MAX;
	if (!rc)
		rc = nl_cb_set(cb, NL_CB_VALID, NL_CB_CUSTOM, note_priority, first);
	if (!rc)
		rc = nl_send_simple(sk, RTM_GETTFILTER, NLM_F_DUMP, &t, sizeof(t));
	if (rc >= 0)
		rc = nl_recvmsgs(sk, cb);
	nl_cb_put(cb);
	return rc < 0 ? rc : 0;
}

/*
 * Who makes something of it, or removes it, is alone.  The name is that of a socket, as that is of
 * the network namespace, and nobody's when its process is gone.
 */
static int lock_tap(const struct kc_plug *p, struct kc_err *err)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), n, e = errno;
	uint64_t until = kc_now_us() + 2 * DRAIN_MS * 1000ull;

	if (fd < 0)
		return kc_fail(err, e, "cannot make a socket: %s", strerror(e));
	n = snprintf(sun.sun_path + 1, sizeof(sun.sun_path) - 1, "kvm-checkpoint-tap-%d", p->tap);
	while (bind(fd, (struct sockaddr *)&sun, offsetof(struct sockaddr_un, sun_path) + 1 + n)) {
		e = errno;
		if (e != EADDRINUSE || kc_now_us() > until) {
			close(fd);
			return kc_fail(err, e, "what is held of %s cannot be locked: %s", p->ifname,
				       strerror(e));
		}
		poll(NULL, 0, 10);
	}
	return fd;
}

/*
 * Making it
 */

static int add_ifb(struct nl_sock *sk, struct kc_plug *p, unsigned int nr, struct kc_err *err)
{
	struct rtnl_link *link = rtnl_link_alloc(), *made;
	char name[2 * IFNAMSIZ];
	int rc;

	snprintf(name, sizeof(name), KC_IFB_NAME, p->tap, nr);
	if (!link || strlen(name) >= IFNAMSIZ) {
		rtnl_link_put(link);
		return kc_fail(err, ENOMEM, "no IFB device can be made for %s", p->ifname);
	}
	rtnl_link_set_name(link, name);
	/* One queue, by which all packets stay in order */
	rtnl_link_set_num_tx_queues(link, 1);
	rtnl_link_set_num_rx_queues(link, 1);
	rtnl_link_set_flags(link, IFF_UP);
	rc = rtnl_link_set_type(link, "ifb");
	if (!rc)
		rc = rtnl_link_add(sk, link, NLM_F_CREATE | NLM_F_EXCL);
	rtnl_link_put(link);
	if (!rc)
		rc = rtnl_link_get_kernel(sk, 0, name, &made);
	if (rc)
		return fail(err, rc, "an IFB device (CONFIG_IFB)", p->ifname);
	p->newest = nr;
	p->ifbs[p->nr_ifbs++] = (struct kc_ifb){ .nr = nr, .index = rtnl_link_get_ifindex(made) };
	rtnl_link_put(made);
	return 0;
}

static int delete_ifb(struct nl_sock *sk, const struct kc_ifb *ifb)
{
	struct rtnl_link *link = rtnl_link_alloc();
	int rc = -NLE_NOMEM;

	if (!link)
		return rc;
	rtnl_link_set_ifindex(link, ifb->index);
	rc = rtnl_link_delete(sk, link);
	rtnl_link_put(link);
	return rc && error_of(rc) != ENODEV ? rc : 0;
}

/* @q: that of a device there, put by the caller */
static int qdisc(struct rtnl_qdisc **q, int index, uint32_t parent, uint32_t handle,
		 const char *kind)
{
	*q = rtnl_qdisc_alloc();
	if (!*q)
		return -NLE_NOMEM;
	rtnl_tc_set_ifindex(TC_CAST(*q), index);
	rtnl_tc_set_parent(TC_CAST(*q), parent);
	rtnl_tc_set_handle(TC_CAST(*q), handle);
	return rtnl_tc_set_kind(TC_CAST(*q), kind);
}

/* @what is told to the plug, with these flags of netlink */
static int tell_plug(struct nl_sock *sk, const struct kc_ifb *ifb, int (*what)(struct rtnl_qdisc *),
		     int flags)
{
	struct rtnl_qdisc *q;
	int rc;

	rc = qdisc(&q, ifb->index, TC_H_ROOT, HANDLE, "plug");
	if (!rc)
		rc = what(q);
	if (!rc)
		rc = rtnl_qdisc_add(sk, q, flags);
	rtnl_qdisc_put(q);
	return rc;
}

static int no_limit(struct rtnl_qdisc *q)
{
	return rtnl_qdisc_plug_set_limit(q, MAX_BYTES);
}

/* Add it, or delete it and all filters that are in it */
static int ingress(struct nl_sock *sk, const struct kc_plug *p, bool add)
{
	struct rtnl_qdisc *q;
	int rc;

	rc = qdisc(&q, p->tap, TC_H_INGRESS, INGRESS, "ingress");
	if (!rc)
		rc = add ? rtnl_qdisc_add(sk, q, NLM_F_CREATE | NLM_F_EXCL) :
		     rtnl_qdisc_delete(sk, q);
	rtnl_qdisc_put(q);
	return rc;
}

/* All that comes from the guest goes there; or does no more */
static int redirect(struct nl_sock *sk, const struct kc_plug *p, const struct kc_ifb *ifb, bool add)
{
	struct rtnl_cls *cls = rtnl_cls_alloc();
	struct rtnl_act *act = add ? rtnl_act_alloc() : NULL;
	int rc = -NLE_NOMEM;

	if (!cls || (add && !act))
		goto out;
	rtnl_tc_set_ifindex(TC_CAST(cls), p->tap);
	rtnl_tc_set_parent(TC_CAST(cls), INGRESS);
	rtnl_cls_set_prio(cls, PRIORITY - ifb->nr);
	rtnl_cls_set_protocol(cls, ETH_P_ALL);
	rc = rtnl_tc_set_kind(TC_CAST(cls), "matchall");
	if (!rc && !add)
		rc = rtnl_cls_delete(sk, cls, 0);
	if (rc || !add)
		goto out;
	rc = rtnl_tc_set_kind(TC_CAST(act), "mirred");
	if (!rc)
		rc = rtnl_mirred_set_action(act, TCA_EGRESS_REDIR);
	if (!rc)
		rc = rtnl_mirred_set_policy(act, TC_ACT_STOLEN);
	if (!rc)
		rc = rtnl_mirred_set_ifindex(act, ifb->index);
	if (!rc)
		rc = rtnl_mall_append_action(cls, act);
	if (!rc)
		rc = rtnl_cls_add(sk, cls, NLM_F_CREATE | NLM_F_EXCL);
out:
	if (act)
		rtnl_act_put(act);
	if (cls)
		rtnl_cls_put(cls);
	return rc;
}

static int is_busy(const struct kc_plug *p, struct kc_err *err)
{
	return kc_fail(err, EBUSY,
		       "%s has an ingress queueing discipline already, which may be somebody's",
		       p->ifname);
}

static int add(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err)
{
	unsigned int olds = p->nr_ifbs, nr = olds ? p->ifbs[olds - 1].nr + 1 : 0, i;
	const struct kc_ifb *ours;
	int rc;

	if (olds == KC_MAX_IFBS || nr > MAX_NR)
		return kc_fail(err, EBUSY, "there are too many IFB devices of %s", p->ifname);
	/* Before there is anything by which it would be taken for ours */
	if (!olds && has_ingress(sk, p))
		return is_busy(p, err);
	rc = add_ifb(sk, p, nr, err);
	if (rc)
		return rc;
	ours = &p->ifbs[olds];
	/* It holds all from the beginning */
	rc = tell_plug(sk, ours, no_limit, NLM_F_CREATE | NLM_F_EXCL);
	if (rc)
		return fail(err, rc, "the queueing discipline plug (CONFIG_NET_SCH_PLUG)", p->ifname);
	rc = ingress(sk, p, true);
	/* With IFB devices of ours it is ours, too */
	if (rc && error_of(rc) == EEXIST && !olds) {
		delete_ifb(sk, ours);
		p->nr_ifbs = 0;
		return is_busy(p, err);
	}
	if (rc && error_of(rc) != EEXIST)
		return fail(err, rc, "an ingress queueing discipline (CONFIG_NET_SCH_INGRESS)",
			    p->ifname);
	rc = redirect(sk, p, ours, true);
	if (rc)
		return fail(err, rc,
			    "a redirection (CONFIG_NET_CLS_MATCHALL, CONFIG_NET_ACT_MIRRED)",
			    p->ifname);
	for (i = 0; i < olds; i++)
		redirect(sk, p, &p->ifbs[i], false);
	return 0;
}

int kc_plug_add(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err)
{
	int rc, lock = lock_tap(p, err);

	if (lock < 0)
		return lock;
	/* What there was when it was found may be gone */
	rc = look(sk, p, err);
	if (!rc)
		rc = add(sk, p, err);
	close(lock);
	return rc;
}

/*
 * Holding and letting go
 */

int kc_plug_mark(struct nl_sock *sk, const struct kc_plug *p, struct kc_err *err)
{
	int rc = tell_plug(sk, &p->ifbs[p->nr_ifbs - 1], rtnl_qdisc_plug_buffer, 0);

	return rc ? fail(err, rc, "a mark", p->ifname) : 0;
}

/* Nothing is in its queue, nor on its way back to the tap device */
static bool is_empty(struct nl_sock *sk, const struct kc_ifb *ifb)
{
	struct nl_cache *qdiscs = NULL;
	struct rtnl_qdisc *q = NULL;
	struct rtnl_link *link = NULL;
	bool empty = true;

	if (!rtnl_qdisc_alloc_cache(sk, &qdiscs))
		q = rtnl_qdisc_get(qdiscs, ifb->index, HANDLE);
	if (q)
		empty = !rtnl_tc_get_stat(TC_CAST(q), RTNL_TC_QLEN);
	/* What it has taken it "receives", and what it has given back it "transmits" */
	if (empty && !rtnl_link_get_kernel(sk, ifb->index, NULL, &link))
		empty = rtnl_link_get_stat(link, RTNL_LINK_RX_PACKETS) <=
			rtnl_link_get_stat(link, RTNL_LINK_TX_PACKETS) +
			rtnl_link_get_stat(link, RTNL_LINK_TX_DROPPED) +
			rtnl_link_get_stat(link, RTNL_LINK_RX_DROPPED);
	if (link)
		rtnl_link_put(link);
	if (q)
		rtnl_qdisc_put(q);
	if (qdiscs)
		nl_cache_free(qdiscs);
	return empty;
}

static void wait_until_empty(struct nl_sock *sk, const struct kc_ifb *ifb)
{
	uint64_t until = kc_now_us() + DRAIN_MS * 1000ull;

	while (!is_empty(sk, ifb) && kc_now_us() < until)
		poll(NULL, 0, 1);
}

/* All of it leaves before anything that came later */
static int let_go(struct nl_sock *sk, const struct kc_ifb *ifb)
{
	int rc = tell_plug(sk, ifb, rtnl_qdisc_plug_release_indefinite, 0);

	/* One that was left half made has no plug, or holds nothing */
	if (rc && (error_of(rc) == ENOENT || error_of(rc) == EINVAL || error_of(rc) == ENODEV))
		return 0;
	if (!rc)
		wait_until_empty(sk, ifb);
	return rc;
}

/* Does all that comes from the guest still go to our IFB device?  If that cannot be found out it does. */
static bool is_first(struct nl_sock *sk, const struct kc_plug *p)
{
	unsigned int first;

	return first_filter(sk, p, &first) || first == PRIORITY - p->ifbs[p->nr_ifbs - 1].nr;
}

int kc_plug_release(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err)
{
	int rc = 0;

	while (p->nr_ifbs > 1 && !rc) {
		rc = let_go(sk, &p->ifbs[0]);
		if (!rc)
			rc = delete_ifb(sk, &p->ifbs[0]);
		if (!rc)
			memmove(p->ifbs, p->ifbs + 1, --p->nr_ifbs * sizeof(p->ifbs[0]));
	}
	if (!rc && !is_first(sk, p))
		return kc_fail(err, ENOENT,
			       "what comes from %s is not held back any more: somebody else has removed or added filters of traffic control",
			       p->ifname);
	if (!rc)
		rc = tell_plug(sk, &p->ifbs[0], rtnl_qdisc_plug_release_one, 0);
	return rc ? fail(err, rc, "to let go packets", p->ifname) : 0;
}

int kc_plug_remove(struct nl_sock *sk, struct kc_plug *p, bool drop, struct kc_err *err)
{
	unsigned int i, n = 0, others;
	int rc, first = 0, lock;
	bool led = false;

	/* Whoever has its name for so long, nothing must be held for ever */
	lock = lock_tap(p, NULL);
	rc = look(sk, p, err);
	if (rc) {
		if (lock >= 0)
			close(lock);
		return rc;
	}
	while (n < p->nr_ifbs && p->ifbs[n].nr <= p->newest)
		n++;
	for (i = 0; i < n && !drop; i++) {
		rc = let_go(sk, &p->ifbs[i]);
		first = first ? first : rc;
	}
	for (i = 0; i < n; i++)
		led |= !redirect(sk, p, &p->ifbs[i], false);
	/* It is ours if there are no filters of others in it, and nobody has come after us */
	if (n && n == p->nr_ifbs &&
	    (first_filter(sk, p, &others) ? led : others == UINT_MAX))
		ingress(sk, p, false);
	for (i = 0; i < n; i++) {
		/* What is not dropped may have come until now */
		if (!drop)
			wait_until_empty(sk, &p->ifbs[i]);
		rc = delete_ifb(sk, &p->ifbs[i]);
		first = first ? first : rc;
	}
	p->nr_ifbs = 0;
	if (lock >= 0)
		close(lock);
	return first ? fail(err, first, "an end of what is held", p->ifname) : 0;
}
