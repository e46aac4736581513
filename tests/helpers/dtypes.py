"""Which dtypes this processor computes in at a useful speed: without bf16 units one convolution takes seconds."""

from __future__ import annotations

import pytest
import torch

HAS_BF16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
# a second dtype that weights are converted to
OTHER = torch.bfloat16 if HAS_BF16 else torch.float64

needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor does not multiply in bf16")
