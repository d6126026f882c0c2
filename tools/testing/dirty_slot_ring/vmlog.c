// SPDX-License-Identifier: GPL-2.0-only
#include "stress.h"
const struct stress_case vm_cases[] = { { } };
