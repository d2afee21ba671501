// The library's version: the one place that states it. Packaging reads this file.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#define QUIRE_VERSION "0.1.0"
