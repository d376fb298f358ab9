"""Every field there is, named once, with its unit and the paper's symbol: recipes start here.

The values are the paper's where it states them (arXiv 2410.07348) and the field's usual choice
where it does not. A recipe file calls `get_config` of this module and changes what makes it itself.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of the initial parameters and of the order of the training rows

    c.model = m = ConfigDict()
    m.num_layers = 12
    m.hidden_size = 768  # D
    m.num_heads = 12  # query heads
    m.num_kv_heads = 12  # fewer than num_heads is grouped-query attention
    m.head_dim = 0  # W, width of a head; 0 is hidden_size / num_heads
    m.qk_norm = "none"  # RMSNorm of queries and keys: of each "head", or of the "full" projection
    m.vocab_size = 65536  # V
    m.moe_every = 1  # every n-th layer is MoE++, the layers between are one dense SwiGLU
    m.dense_ffn_size = 2048  # width of those dense layers
    m.tied_embeddings = False  # the output matrix is the embedding matrix
    m.rope_theta = 10_000.0
    # How rotary positions are stretched for longer sequences: "linear", all are divided by
    # rope_scaling; "llama3" (Llama 3.1), only frequencies are that turn at most
    # rope_low_freq_factor times in rope_original_length tokens, those that turn
    # rope_high_freq_factor times or more stay, and those between are between.
    m.rope_type = "linear"
    m.rope_scaling = 1.0
    m.rope_low_freq_factor = 1.0
    m.rope_high_freq_factor = 4.0
    m.rope_original_length = 8192
    m.sliding_window = 0  # tokens that each sees, itself among them (Mistral v0.1); 0: all before
    m.norm_eps = 1e-6
    m.init_std = 0.01  # of every matrix (the released value); norms are 1
    m.const_std = 1.0  # of the constant experts' vectors (the authors' code)
    m.dtype = "bfloat16"  # of the arithmetic; parameters and router are float32
    # The kernel of training and evaluation: "splash" on TPU, "cudnn" on GPU, "xla" anywhere; "auto"
    # is the platform's own, or "xla" where that cannot compute the model, which is then said.
    m.attention = "auto"
    # What backward computes again, from least to most: "none", "qkv", "residual", "w_in", "dots",
    # "attention", "routing", "exchanged", "full"; docs/PODS.md says what each keeps and costs.
    m.remat = "none"
    m.loss_chunk = 256  # tokens of a sequence whose logits exist at once

    c.moe = e = ConfigDict()
    e.n_ffn = 8  # E, FFN experts
    e.n_const = 2  # J, constant experts
    e.n_copy = 1
    e.n_zero = 1  # (n_const, n_copy, n_zero) = (0, 0, 0) is the vanilla MoE
    e.ffn_size = 2048  # F, width of one FFN expert
    e.gamma = 1.1  # gamma, the capacity factor: slots are gamma times the rule's load at balance
    # S, tokens that share a capacity: a part of a sequence, or several whole sequences of a device,
    # to which slots are given position by position.
    e.group_size = 2048
    e.dispatch = "capacity"  # in training: "capacity" (drops) or "dropless" (exact)
    e.eval_dispatch = "dropless"  # in evaluation; generation is always dropless
    # Dropless on an expert axis: rows that a device can be sent, in units of the K T that its own
    # tokens choose, rounded up to a multiple of 128 on TPU. What does not fit is dropped and
    # counted (which assignments that are depends on the mesh); 0 is room for the worst case.
    e.exchange_buffer = 0.0
    # Parts of a device's groups that cross the expert axis one after the other, so that experts
    # compute one while another is under way; at most as many as divide the groups. Each has its
    # share of the buffer's rows.
    e.exchange_parts = 1
    e.input_scale = 1.0  # multiplies the experts' input, not the router's (the authors' option: K)
    # How tokens choose experts: a rule of moepp_jax/moe/rules with its options, see there; those of
    # the other rules stand in configs/routing/.
    e.rule = r = ConfigDict({"type": "moepp"})
    r.top_k = 2  # K, experts a token
    r.tau = 0.75  # tau, the share that a zero-computation expert has of an FFN expert's weight
    r.router_layers = 1  # 1 matrix, or 2 with tanh between (8 N wide)
    r.logit_norm = 0.0  # standard deviation that a token's logits are given; 0: they stay
    r.residual = "logits"  # gating residual from the layer before: "logits", "detached", "none"
    r.gate = "renormalise_nonzero"  # also "raw", "renormalise_all", "softmax_selected"
    r.balance_weight = 0.01  # beta; the loss has the customary factor N, mean over the layers
    # u: after each step the bias that zero-computation experts have on their logits moves by this,
    # or by less near it, towards the share of the tokens that tau asks for; 0: there is no bias.
    r.bias_rate = 0.0
    r.z_weight = 0.0  # weight of the router's z-loss, mean over the layers
    # Added to the logits of zero-computation experts when they are scored (and by --zero_offset of
    # a trained model): above 0 fewer FFN experts run, below 0 more.
    r.zero_offset = 0.0

    c.data = d = ConfigDict()
    # Where text comes from, under names of your own: what is trained on is their mixture.
    d.sources = ConfigDict({"text": source("default")})
    d.dir = "data"  # where prepared data sets and tokenizers are kept
    d.tfds_dir = ""  # where TFDS keeps its data sets (tfds:NAME), gs:// too; empty: its default
    # A SentencePiece .model file or a tokenizer.json; empty: train one of model.vocab_size pieces.
    d.tokenizer = ""
    d.seq_len = 2048  # L, tokens
    d.eval_fraction = 0.02  # share of the documents held out, chosen by their hash
    d.worker_processes = 0  # that read batches ahead; 0: threads of the process that trains do

    c.optim = o = ConfigDict()
    o.lr = 5e-4  # maximum; cosine, linear and a final decay end at lr * final_lr_ratio
    o.schedule = "cosine"  # after the warm-up: "cosine", "linear", or "constant" with decay_steps
    o.decay_steps = 0  # last steps of a "constant" one, in which it falls linearly; 0: none
    o.final_lr_ratio = 0.1
    o.initial_lr = 1e-7  # where the linear warm-up starts
    o.warmup_steps = 2000
    o.beta1 = 0.9
    o.beta2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.1  # of matrices; norms and constants are not decayed
    o.clip_norm = 1.0  # of the global gradient norm

    c.train = t = ConfigDict()
    t.steps = 23_842  # 100 B tokens in batches of 4 M
    t.first_batch = 0  # batch of the first step; a parent's steps: its text goes on (--init_from)
    t.batch_size = 2048  # sequences an optimizer step
    t.accumulate = 1  # parts that the batch is worked through in
    t.log_every = 10  # steps
    t.eval_every = 1000  # steps
    t.eval_batches = 16  # batches of held-out text in such an evaluation; 0 is all of it
    t.save_every = 1000  # steps
    t.keep = 2  # newest checkpoints kept, beside the best
    # A checkpoint that cannot be written: "stop" ends the run, "continue" warns, at each of them;
    # the last one of a run ends it with an error in any case.
    t.on_save_error = "stop"
    # A second copy of the state, on each host's own disk, for the steps between two checkpoints:
    # docs/PODS.md says when it is of use. {process} in it is the process's number; empty: none.
    t.local_dir = ""
    t.local_every = 100  # steps between two local copies; the newest two are kept
    # A loss or a gradient that is not finite: "stop" ends the run, "skip" leaves the update out.
    t.on_nonfinite = "stop"
    t.max_skipped = 10  # updates left out in a row that end the run
    t.skip_above = 0.0  # multiple of the gradient's usual norm above which one is skipped; 0: none
    # A step, or a batch of an evaluation, that takes so many times what it usually does, and at
    # least so long, is reported as hanging, with the process that is late; after as long again the
    # run ends, with status 75. What compiles, and a save, has ten times hang_seconds.
    t.hang_factor = 10.0
    t.hang_seconds = 300.0  # 0: nothing is watched, and processes tell each other nothing

    c.mesh = h = ConfigDict()  # tokens are split over all three axes; -1 is "the rest"
    h.data = -1  # replicas
    h.fsdp = 1  # parameters and optimizer state are sharded
    h.expert = 1  # FFN experts are sharded; divides n_ffn

    c.generate = g = ConfigDict()
    g.max_new_tokens = 128
    g.temperature = 0.0  # 0 is greedy
    g.top_k = 0  # only the so many best tokens; 0 is off
    g.top_p = 1.0  # only the best ones that have so much of the probability; 1 is off
    g.min_p = 0.0  # only those so probable as this share of the best; 0 is off
    g.repetition_penalty = 1.0  # divides the logits of tokens in the text; 1 is off
    g.seed = 0
    return c


def source(path: str, weight: float = 1.0, text_field: str = "text") -> dict:
    """A source of text.

    Args:
      path: "default", or "default/wikipedia", "default/shakespeare", "default/king_james"; a text,
        JSON, Parquet or Arrow file, a folder of such files, or a pattern of files ("src/**/*.py");
        "tfds:NAME[/CONFIG][:VERSION]", or the folder (gs:// too) of a data set that TFDS prepared.
      weight: share of its tokens in training, in any unit.
      text_field: of a record, or of a TFDS example: the text.
    """
    return {"path": path, "weight": weight, "text_field": text_field}


def variant(c: ConfigDict, name: str) -> ConfigDict:
    """The recipe itself ("moepp"), or its vanilla twin with no zero-computation expert ("moe").

    The twin has no gating residual either and balances all its experts alike (tau = 1).
    """
    if name == "moepp":
        return c
    if name == "moe":
        c.moe.update(n_const=0, n_copy=0, n_zero=0)
        c.moe.rule.update(tau=1.0, residual="none")
        return c
    raise ValueError(f"no variant {name!r} of this recipe: write :moepp or :moe, or nothing")
