"""QAT through PyTorch 2 export (PT2E): export, fake-quantize by torchao's prepare_qat_pt2e, train, lower to packed ops.

Reading order: ``prepared`` (the one-call form), ``quantizer`` (what is quantized), ``fake_quant`` (how it is lowered).
"""

from potqat.pt2e.fake_quant import PoTPerChannelFakeQuantize
from potqat.pt2e.prepared import PreparedModel, convert, prepare
from potqat.pt2e.quantizer import PoTQuantizer

__all__ = ["PoTPerChannelFakeQuantize", "PoTQuantizer", "PreparedModel", "convert", "prepare"]
