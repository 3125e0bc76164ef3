// For NVRTC, to which size_t is known without. SPDX-License-Identifier: Apache-2.0
#pragma once
