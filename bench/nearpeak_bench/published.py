"""Dimensions of published models, as their config.json on the Hugging Face hub gives them; see shapes.py."""

CONFIGS = {
    "llama3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "vocab_size": 128256,
    },
    "gemma3-270m": {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "sliding_window": 512, "max_position_embeddings": 32768, "vocab_size": 262144,
    },
    "bert-base": {
        "model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "max_position_embeddings": 512,
        "vocab_size": 30522,
    },
    "t5-base": {
        "model_type": "t5", "d_model": 768, "d_ff": 3072, "num_heads": 12, "d_kv": 64, "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6, "n_positions": 512, "vocab_size": 32128,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_head": 12, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "n_positions": 1024, "vocab_size": 50257,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 40960, "vocab_size": 151936,
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": 4096, "max_position_embeddings": 32768, "vocab_size": 32000,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 163840, "vocab_size": 129280,
    },
}  # fmt: skip
