"""Arguments of every operator, with which it is shown to PyTorch's machinery."""

import nearpeak
import torch
from inputs import randn, sequence_first

ANGLES = torch.outer(torch.arange(9.0), 1e2 ** -(torch.arange(0, 16, 2) / 16))
COS, SIN = ANGLES.cos(), ANGLES.sin()


def norm_operands():
    return randn(2, 4, 17), randn(17, seed=1)


def rotary_operands():
    return randn(2, 3, 9, 16), sequence_first(randn(2, 1, 9, 16, seed=1))


def qk_operands():
    return sequence_first(randn(2, 3, 9, 16)), randn(2, 2, 9, 16, seed=1)


def attention_operands(query_length=9):
    return randn(2, 4, query_length, 16), sequence_first(randn(2, 2, 11, 16, seed=1)), randn(2, 2, 11, 16, seed=2)


def attention_and_gradients():
    query, key, value = attention_operands()
    out, lse = torch.ops.nearpeak.attention_inference(query, key, value, 4, 0, 0.25, None)
    return randn(*out.shape, seed=3), randn(*lse.shape, seed=4), query, key, value, out, lse


def block_tables():
    """Of a causal mask per head, in blocks of 4 queries and 3 keys: most whole, some not, some rows without any."""

    def mask_mod(batch, head, query, key):
        return (query >= key + head - 1) & (query != 5)

    return nearpeak.create_block_mask(mask_mod, None, 4, 9, 11, block_size=(4, 3))[:3]


def blocks_and_gradients():
    grad_out, grad_lse, query, key, value, out, lse = attention_and_gradients()
    return grad_out, grad_lse, query, key, value, out, lse, *block_tables()


def linear_operands():
    return randn(2, 4, 17), randn(3, 17, seed=1), randn(3, seed=2)


def quantized_operands(bits=8, symmetric=True):
    return randn(2, 4, 64), nearpeak.quantize_weight(randn(3, 64, seed=1), bits, 32, symmetric), randn(3, seed=2)


def epilogue_operands():
    return *linear_operands(), randn(2, 4, 3, seed=3)


def leaves(*tensors):
    return tuple(t.requires_grad_() for t in tensors)


def _quantized(made, **options):
    """Arguments of the operator; made: x and bias from those of quantized_operands."""
    x, weight, bias = quantized_operands(**options)
    x, bias = made(x, bias)
    return x, *weight[:3], bias, weight.bits


X, WEIGHT = norm_operands()
WORDS, IDS = randn(6, 17, seed=3), torch.tensor([[2, 0, 3, 2], [1, 2, 0, 0]])
PACKED = torch.cat((X, X), dim=-1)
SCORE_TABLE = randn(4, 16, seed=8)
SCORE_MOD = nearpeak.trace_score_mod(lambda score, b, h, q, k: score * score + SCORE_TABLE[h % 4, (k - q) % 16])
MASK, BIAS, SLOPES = randn(2, 1, 9, 11) < 1.0, randn(1, 4, 9, 11, seed=5), randn(4, seed=6).abs()


def lora_operands():
    return X.clone(), randn(5, 17), randn(3, 17, seed=1), randn(5, 3, seed=1)


GGUF_Q8_0 = 8
BLOCKS = randn(3, 68, seed=9).mul(32).to(torch.int32).to(torch.uint8)
BLOCKS[:, 1] = BLOCKS[:, 35] = 40  # small scales

SAMPLES = {
    "rms_norm": [
        (*leaves(*norm_operands()), 1e-6, 1.0, False),
        (X[0].T.detach().requires_grad_(), None, 0.1, 0.0, True),
    ],
    "rms_norm_inference": [(X, WEIGHT, 1e-6, 1.0, False), (X.bfloat16(), WEIGHT, 1e-6, 0.0, True)],
    "add_rms_norm": [(*leaves(X.clone(), X.clone(), WEIGHT.clone()), 1e-6, 0.0, False)],
    "add_rms_norm_inference": [(X, X, None, 1e-6, 0.0, False)],
    "rms_norm_out": [
        (X, WEIGHT, None, 1e-6, 0.0, False, torch.empty_like(X), None),
        (X, None, X, 1e-6, 1.0, True, torch.empty_like(X), torch.empty_like(X)),
    ],
    "rms_norm_backward": [(X, X, WEIGHT, None, 1e-6, 0.0), (X, X, None, X, 1e-6, 1.0)],
    "layer_norm": [
        (*leaves(*norm_operands(), randn(17, seed=2)), 1e-5),
        (X[0].T.detach().requires_grad_(), None, None, 0.1),
    ],
    "layer_norm_inference": [(X, WEIGHT, WEIGHT, 1e-5), (X.bfloat16(), None, WEIGHT, 1e-5)],
    "add_layer_norm": [(*leaves(X.clone(), X.clone(), WEIGHT.clone()), None, 1e-5)],
    "add_layer_norm_inference": [(X, X, None, None, 1e-5)],
    "layer_norm_of_sum": [(X, X.transpose(0, 1).contiguous().transpose(0, 1), WEIGHT, WEIGHT, 1e-5)],
    "layer_norm_out": [
        (X, WEIGHT, WEIGHT, None, 1e-5, torch.empty_like(X), None),
        (X, None, None, X, 1e-5, torch.empty_like(X), None),
        (X, None, None, X, 1e-5, torch.empty_like(X), torch.empty_like(X)),
    ],
    "layer_norm_backward": [(X, X, WEIGHT, WEIGHT, None, 1e-5), (X, X, None, WEIGHT, X, 1e-5)],
    "qk_norm": [
        (*leaves(*qk_operands(), WEIGHT[:16].clone(), WEIGHT[1:].clone()), 1e-6, 1.0, False),
        (*leaves(*qk_operands()), None, None, 1e-6, 0.0, True),
    ],
    "qk_norm_inference": [(*qk_operands(), WEIGHT[:16], None, 1e-6, 0.0, False)],
    "qk_norm_backward": [(*qk_operands(), *qk_operands(), None, WEIGHT[:16], 1e-6, 0.0)],
    "embedding": [
        (IDS, *leaves(WORDS.clone()), *[None] * 6, 2.0, None, None, 0.0, 0, False),
        (
            IDS,
            *leaves(WORDS.clone(), WORDS + 1),
            IDS,
            *leaves(WORDS - 1),
            IDS,
            *leaves(WEIGHT.clone()),
            None,
            1.0,
            1e-5,
            torch.tensor(3),
            0.5,
            -1,
            False,
        ),
    ],
    "embedding_inference": [(IDS, WORDS.bfloat16(), *[None] * 6, 2.0, None, None, 0.0, -1, False)],
    "embedding_hidden_gradient": [
        (WORDS[IDS], IDS, WORDS, WORDS, None, None, None, None, WEIGHT, 1.0, 1e-5, None, 0.0),
    ],
    "embedding_table_gradient": [(WORDS, IDS[0, :3], 4, 2.0, -1), (WORDS.half(), IDS[0, :3], 9, 1.0, 2)],
    "apply_rotary": [
        (*leaves(*rotary_operands()), COS[None], SIN[None], False, False, 16),
        (*leaves(*rotary_operands()), COS[None, :, :4], SIN[None, :, :4], True, False, 8),
    ],
    "apply_rotary_inference": [(*rotary_operands(), COS[None], SIN[None], False, True, 16)],
    "apply_rotary_": [
        (*rotary_operands(), COS[None], SIN[None], True, False, 16),
        (*rotary_operands(), COS[:, :2], SIN[:, :2], False, False, 4),
    ],
    "attention": [
        (*leaves(*attention_operands()), None, 0, 0.25, None),
        (*leaves(*attention_operands()), None, 0, 0.25, None, MASK, *leaves(BIAS), SLOPES, *leaves(randn(4, seed=7))),
        (*leaves(*attention_operands(1)), 4, None, 1.0, 5.0),
        (*leaves(*attention_operands()), None, 0, 0.25, None, *[None] * 7, torch.tensor(3), 0.5),
        (*leaves(*attention_operands()), None, 0, 0.25, None, *[None] * 8, 0.0, SCORE_MOD.program, SCORE_MOD.tensors),
    ],
    "attention_inference": [(*(t.bfloat16() for t in attention_operands()), None, None, 0.25, None)],
    "attention_blocks": [
        (*leaves(*attention_operands()), *block_tables(), None, None, 0.25, None),
        (*leaves(*attention_operands()), *block_tables(), 4, 0, 0.25, 5.0, MASK, *leaves(BIAS.detach()), SLOPES),
    ],
    "attention_blocks_inference": [
        (*(t.bfloat16() for t in attention_operands()), *block_tables(), None, None, 0.25, None)
    ],
    "attention_blocks_backward": [
        (*blocks_and_gradients(), None, None, 0.25, None),
        (*blocks_and_gradients(), 4, 0, 0.25, None, MASK, BIAS.detach(), SLOPES, *[None] * 5, 0.0, None, None, True),
    ],
    "dropout_mask": [(torch.tensor(3), 0.5, [2, 4, 9, 33], [0, 5, 7])],
    "activation": [(*leaves(X.clone()), kind) for kind in range(6)],
    "activation_inference": [(X.bfloat16(), 4)],
    "activation_backward": [(X, X[0].expand_as(X), 1)],
    "gated_activation": [(*leaves(X.clone(), X.clone()), 1)],
    "gated_activation_inference": [(X.transpose(0, 1), X.transpose(0, 1), 2)],
    "gated_activation_backward": [(X, X, X, 4)],
    "packed_gated_activation": [(*leaves(PACKED.clone()), 4, up_first) for up_first in (False, True)],
    "packed_gated_activation_inference": [(PACKED.transpose(0, 1), 0, False)],
    "packed_gated_activation_backward": [(X, PACKED, 4, True)],
    "linear": [leaves(*linear_operands()), (*leaves(*linear_operands()[:2]), None)],
    "linear_inference": [tuple(t.bfloat16() for t in linear_operands()), (X.transpose(0, 1), randn(3, 17), None)],
    "linear_epilogue": [
        (*leaves(*epilogue_operands()), 1, True),
        (*leaves(*linear_operands()), None, 4, True),
        (*leaves(*epilogue_operands()), None, False),
    ],
    "linear_epilogue_inference": [(*(t.bfloat16() for t in epilogue_operands()), 2, False)],
    "quantized_linear_epilogue": [
        (*_quantized(leaves), *leaves(epilogue_operands()[3]), 1, True),
        (*_quantized(leaves, bits=4, symmetric=False), None, 0, True),
        (*_quantized(leaves), None, 0, True, 8),
    ],
    "quantized_linear_epilogue_inference": [
        (*_quantized(lambda x, bias: (x.bfloat16(), None)), epilogue_operands()[3].bfloat16(), None, False)
    ],
    "quantized_linear": [
        _quantized(leaves),
        _quantized(lambda x, bias: (*leaves(x), None), bits=4, symmetric=False),
        (*_quantized(leaves), 8),
    ],
    "quantized_linear_inference": [_quantized(lambda x, bias: (x.bfloat16().transpose(0, 1), None), bits=4)],
    "gguf_linear": [
        (*leaves(randn(2, 64)), BLOCKS, *leaves(randn(3)), GGUF_Q8_0, *leaves(randn(2, 3, seed=1)), 3, True),
        (*leaves(randn(2, 64)), BLOCKS, None, GGUF_Q8_0, None, None, False),
        (*leaves(randn(2, 64)), BLOCKS, None, GGUF_Q8_0, None, None, False, 8),
    ],
    "gguf_linear_inference": [(randn(2, 64).bfloat16(), BLOCKS, None, GGUF_Q8_0, None, 1, False)],
    "lora_linear": [
        (*leaves(*lora_operands()), 0.5, *leaves(randn(5)), *leaves(randn(2, 4, 5, seed=2)), 1, True),
        (*leaves(*lora_operands()), 2.0, None, None, None, False),
    ],
    "lora_linear_inference": [(*(t.bfloat16() for t in lora_operands()), 2.0, None, None, 1, False)],
    "lora_input_gradient": [(randn(2, 4, 5), randn(5, 17), randn(2, 4, 3), randn(3, 17))],
    "linear_input_gradient": [(randn(2, 4, 5), randn(5, 17)), (randn(5, 4).T, randn(5, 17))],
    "linear_bias_gradient": [(randn(2, 4, 5),), (randn(5).bfloat16(),)],
    "linear_weight_gradient": [(randn(2, 4, 5), X), (randn(4, 2, 5).transpose(0, 1), X)],
    "attention_backward": [
        (*attention_and_gradients(), 4, 0, 0.25, None),
        (*attention_and_gradients(), 4, 0, 0.25, None, *[None] * 7, torch.tensor(3), 0.5),
        (*attention_and_gradients(), 4, 0, 0.25, None, *[None] * 8, 0.0, SCORE_MOD.program, SCORE_MOD.tensors),
        (*attention_and_gradients(), 4, 0, 0.25, None, MASK, BIAS.detach(), SLOPES, *[None] * 5, 0.0, None, None, True),
    ],
}
