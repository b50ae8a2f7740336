"""EasyDeL's side of `benchmarks/peers.py`.

EasyDeL 0.3.0 is imported only where Pillow and PyTorch are, which its package does not name. Its
model is made from the checkpoint's configuration, and the weights are put in by name.
It computes attention in bfloat16 unless told otherwise. Its `generate` is compiled whole, as in its
trainers: called as it is, it would compile its loop again in every call. Its server eSurge, which
takes and gives text by way of other processes, is not measured. A training step is a compiled one
of its model's `compute_loss` with optax, which is its trainer's step without data and logging.
"""

import functools
import json
import os
from pathlib import Path

DISTRIBUTION = "easydel"
FIELDS = {}  # of the weights' configuration: none that its Llama does not follow
SAME = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
]  # fmt: skip


def _fill(model, weights):
    """Puts the weights of a checkpoint of transformers, by name, into a model of the same names."""
    import jax.numpy as jnp

    for name, value in weights.items():
        module = model
        for part in name.split(".")[:-1]:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        if hasattr(module, "embedding"):
            module.embedding.value = jnp.asarray(value)
        else:
            module.kernel.value = jnp.asarray(value.T)


def load(folder: str) -> dict:
    """What EasyDeL can be asked for, by name, with the weights in `folder`."""
    os.environ["ENABLE_DISTRIBUTED_INIT"] = "0"
    import easydel
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from safetensors.numpy import load_file
    from transformers import GenerationConfig

    fields = json.loads((Path(folder) / "config.json").read_text())
    config = easydel.LlamaConfig(
        **{name: fields[name] for name in SAME},
        rope_theta=fields["rope_parameters"]["rope_theta"],
        attn_dtype=jnp.float32,
    )
    model = easydel.LlamaForCausalLM(
        config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    _fill(model, load_file(Path(folder) / "model.safetensors"))

    def trained(path, value):
        return isinstance(value, nnx.Param) and path[0] != "lm_head"  # the embedding is the head

    graph, params, rest = nnx.split(model, trained, ...)

    @functools.partial(jax.jit, static_argnums=3)
    def generate(params, rest, ids, new_tokens):
        module = nnx.merge(graph, params, rest)
        how = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        with module.mesh:
            return module.generate(
                input_ids=ids, attention_mask=jnp.ones_like(ids), generation_config=how
            ).sequences

    def decode(prompts, new_tokens):
        ids = np.asarray(prompts, np.int32)
        return np.asarray(generate(params, rest, ids, new_tokens))[:, ids.shape[1] :].tolist()

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1)
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, rest, tokens):
        params, moments = state

        def loss(params):
            module = nnx.merge(graph, params, rest)
            with module.mesh:
                return module.compute_loss(input_ids=tokens, labels=tokens)[1].loss

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    holder = []

    def train(tokens):
        if not holder:
            own = jax.tree.map(jnp.copy, params)  # steps give their arguments away
            holder.append((own, optimizer.init(own)))
        holder[0], value = step(holder[0], rest, np.asarray(tokens, np.int32))
        return float(value)

    return {"decode": decode, "train": train}
