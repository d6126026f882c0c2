# SPDX-License-Identifier: GPL-2.0-only
#
# Turns the tests' serial line into verdicts, and cuts it into a log per test.
#
# In:  token (what markers begin with), why ("done", or why the guest did not get
#      to its end), dir, list, splats (of splats.awk), require (M.P=V ...)
# Out: name, pass|fail|skip, seconds, reason, separated by tabs

function verdict(name, what, secs, reason)
{
	print name "\t" what "\t" secs + 0 "\t" reason
}

BEGIN {
	while ((getline line < list) > 0) {
		if (line ~ /^(#|$)/)
			continue
		split(line, f, "|")
		order[++n] = f[1]
		limit[f[1]] = f[2]
	}
	while ((getline line < splats) > 0) {
		split(line, f, "\t")
		nsplats++
		if (!(f[1] in splat))
			splat[f[1]] = f[3] " (console.log:" f[2] ")"
		if (!first_splat)
			first_splat = f[3] " (console.log:" f[2] ")"
	}
}

index($0, token " ") == 1 {
	split($0, w, " ")
	if (w[2] == "BOOT") {
		booted = 1
	} else if (w[2] == "PARAM") {
		split(w[3], p, "=")
		param[p[1]] = p[2]
	} else if (w[2] == "BEGIN") {
		now = w[3]
		begun[now] = 1
		printf "" > (dir "/" now ".log")
	} else if (w[2] == "END") {
		rc[w[3]] = w[4]
		took[w[3]] = w[5]
		if (now)
			close(dir "/" now ".log")
		now = ""
	}
	next
}

now {
	print > (dir "/" now ".log")
	# The last word of a test that failed or skipped is the best reason.
	if ($0 ~ /(FAIL|SKIP|failed|[Ss]kip|not ok|Assert|not supported)/ && !(now in hint))
		hint[now] = $0
}

END {
	for (i = 1; i <= n; i++)
		close(dir "/" order[i] ".log")

	bad = booted ? "" : "it did not boot: " why
	nreq = split(require, req, " ")
	for (i = 1; i <= nreq && booted; i++) {
		split(req[i], p, "=")
		if (!(p[1] in param))
			bad = "no " p[1] " in the guest: KVM is not there"
		else if (p[2] != "*" && param[p[1]] != p[2])
			bad = p[1] " is " param[p[1]] ", needed is " p[2]
	}
	verdict("boot", bad ? "fail" : "pass", 0, bad)

	for (i = 1; i <= n; i++) {
		t = order[i]
		gsub(/[\t]/, " ", hint[t])
		if (!(t in begun))
			verdict(t, "fail", 0, "not run: " why)
		else if (!(t in rc))
			verdict(t, "fail", 0, "did not finish: " why (t in splat ? "; " splat[t] : ""))
		else if (t in splat)
			verdict(t, "fail", took[t], "kernel message: " splat[t])
		else if (bad)
			verdict(t, "fail", took[t], bad)
		else if (rc[t] == "timeout")
			verdict(t, "fail", took[t], "timed out after " limit[t] " s")
		else if (rc[t] == 0)
			verdict(t, "pass", took[t], "")
		else if (rc[t] == 4)
			verdict(t, "skip", took[t], hint[t])
		else
			verdict(t, "fail", took[t], "exit status " rc[t] (hint[t] ? ": " hint[t] : ""))
	}

	if (nsplats)
		verdict("console", "fail", 0, nsplats " line(s), the first: " first_splat)
	else if (why != "done")
		verdict("console", "fail", 0, why)
	else
		verdict("console", "pass", 0, "")
}
