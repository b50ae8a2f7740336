"""The rows of the table of methods: every published method that has a place in tokjax."""
# ruff: noqa: E501

from dataclasses import dataclass
from typing import Literal, get_args

Family = Literal[
    "pretraining",
    "finetuning",
    "preference",
    "rl",
    "gflownet",
    "decoding",
    "tokenization",
    "analysis",
    "audio",
    "vision",
    "series",
    "recsys",
    "retrieval",
    "prompts",
]
State = Literal["planned", "implemented", "reproduced", "did not reproduce"]

FAMILIES: tuple[Family, ...] = get_args(Family)
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
      slug: the name of its module, config and reproduction.
      title: title of the paper.
      arxiv: arXiv identifier.
      year: year of the first version.
      family: the part of tokjax that it belongs to.
      summary: what it does, in one line.
      entry: dotted path of its module or function, "" while planned.
      state: how far it is here.
    """

    slug: str
    title: str
    arxiv: str
    year: int
    family: Family
    summary: str
    entry: str = ""
    state: State = "planned"


# One row a line: the table is read and edited by row.
# fmt: off
_ROWS = (
    # pretraining
    Method("brillm", "BriLLM: Brain-inspired Large Language Model", "2503.11299", 2025, "pretraining", "A graph with one node per token passes a signal along the text; the next token is where its energy is largest.", "tokjax.pretraining.brillm", "did not reproduce"),
    Method("hyperschedules_hdlm", "Unifying Autoregressive and Diffusion-Based Sequence Generation", "2504.06416", 2025, "pretraining", "Noise schedules per position join autoregression and text diffusion; mixed noise teaches the model to correct itself.", "tokjax.pretraining.hdlm", "reproduced"),
    Method("lexinvariant_lm", "Lexinvariant Language Models", "2305.16349", 2023, "pretraining", "Every sequence draws new random embeddings, so symbols get their meaning from context alone.", "tokjax.pretraining.lexinvariant", "reproduced"),
    Method("mae_lm", "Representation Deficiency in Masked Language Modeling", "2302.02060", 2023, "pretraining", "A masked autoencoder for text: the encoder never sees the mask symbol and spends no dimensions on it.", "tokjax.pretraining.mae_lm", "did not reproduce"),
    Method("patch_training", "Patch-Level Training for Large Language Models", "2407.12665", 2024, "pretraining", "Trains first on averaged patches of K tokens, then on single tokens, for about half the compute.", "tokjax.pretraining.patch_training", "did not reproduce"),
    Method("signal_processing_llm", "Towards Signal Processing In Large Language Models", "2406.10254", 2024, "pretraining", "Learned causal filter banks reshape each activation coordinate as a signal along the tokens.", "tokjax.pretraining.signal_processing_llm", "reproduced"),
    Method("syntactic_smoothing", "Mitigating Frequency Bias and Anisotropy in Language Model Pre-Training with Syntactic Smoothing", "2410.11462", 2024, "pretraining", "Spreads part of the target over words of like part of speech, so that rare tokens learn from frequent ones.", "tokjax.pretraining.syntactic_smoothing", "did not reproduce"),
    Method("tree_cross_attention", "Tree Cross Attention", "2309.17388", 2023, "pretraining", "A learned walk down a tree of context summaries replaces attention to all N tokens by O(log N).", "tokjax.pretraining.tree_cross_attention", "reproduced"),
    Method("wavelet_gpt", "Wavelets Meet Large Language Models", "2409.12924", 2024, "pretraining", "Half of the coordinates carry causal moving averages at several time scales, without new parameters.", "tokjax.pretraining.wavelet_gpt", "did not reproduce"),
    # finetuning
    Method("cat_attention", "CAT: Causal Attention Tuning For Injecting Fine-grained Causal Knowledge into Large Language Models", "2509.01535", 2025, "finetuning", "Penalises attention that falls on annotated causes less than on the rest of the context.", "tokjax.finetuning.cat_attention", "did not reproduce"),
    Method("fim_se", "Empowering Character-level Text Infilling by Eliminating Sub-Tokens", "2405.17103", 2024, "finetuning", "Infills whole lines and tells the model by which characters they start and end, so no hole splits a token."),
    Method("lcbm", "Large Content and Behavior Models to Understand, Simulate, and Optimize Content and Behavior", "2309.00359", 2023, "finetuning", "Writes the audience's behaviour into the training text and learns to predict it from content and back.", "tokjax.finetuning.lcbm", "did not reproduce"),
    Method("one_token_rollout", "One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient", "2509.26313", 2025, "finetuning", "Treats every supervised position as a one-step bandit on tokens that the model samples itself.", "tokjax.finetuning.one_token_rollout", "did not reproduce"),
    Method("q_tuning", "Winning the Pruning Gamble: A Unified Approach to Joint Sample and Token Pruning for Efficient Supervised Fine-Tuning", "2509.23873", 2025, "finetuning", "Places samples by error and uncertainty; drops noisy and mastered ones, and prunes tokens in the rest.", "tokjax.finetuning.q_tuning", "reproduced"),
    Method("r1_compress", "R1-Compress: Long Chain-of-Thought Compression via Chunk Compression and Search", "2505.16838", 2025, "finetuning", "Rewrites reasoning traces chunk by chunk, choosing short versions that stay likely, and trains on them.", "tokjax.finetuning.r1_compress", "did not reproduce"),
    Method("rft_shad", "Disentangling Reasoning Tokens and Boilerplate Tokens For Language Model Fine-tuning", "2412.14780", 2024, "finetuning", "Finds boilerplate by the loss under a model tuned on shuffled answers, and weights reasoning tokens up.", "tokjax.finetuning.rft", "reproduced"),
    Method("star_dss", "Shape it Up! Restoring LLM Safety during Finetuning", "2505.17196", 2025, "finetuning", "A guard scores every prefix: safe tokens are imitated, unsafe ones held to an aligned reference.", "tokjax.finetuning.star_dss", "reproduced"),
    Method("trim", "TRIM: Token-wise Attention-Derived Saliency for Data-Efficient Instruction Tuning", "2510.07118", 2025, "finetuning", "Selects instruction data whose token states match saliency-weighted fingerprints of the target task.", "tokjax.selection.trim", "did not reproduce"),
    # preference
    Method("cdpo", "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability", "2411.19943", 2024, "preference", "Weights the rejected side of DPO by how critical a token is, from models of right and wrong chains.", "tokjax.preference.critical_tokens", "did not reproduce"),
    Method("figa", "Beyond Imitation: Leveraging Fine-grained Quality Signals for Alignment", "2311.04072", 2023, "preference", "The edits from a poor to a revised answer say which tokens to make likelier and which less likely.", "tokjax.preference.figa", "did not reproduce"),
    Method("mr_align", "MR-ALIGN: Meta-Reasoning Informed Factuality Alignment for Large Reasoning Models", "2510.24794", 2025, "preference", "KTO in which transitions between states of the reasoning weight each segment's log-ratios.", "tokjax.preference.meta_reasoning", "did not reproduce"),
    # rl
    Method("d3s", "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization", "2509.22115", 2025, "rl", "Updates on the rollouts of largest advantage variance and on their most telling tokens, relaxing with time.", "tokjax.rl.d3s", "did not reproduce"),
    Method("drlc", "DRLC: Reinforcement Learning with Dense Rewards from LLM Critic", "2401.07382", 2024, "rl", "A frozen critic quotes the spans that helped or hurt; their tokens get a reward of their own in PPO.", "tokjax.rl.drlc", "did not reproduce"),
    Method("gtpo_grpo_s", "GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy", "2508.04349", 2025, "rl", "Shares a group's reward out by policy entropy, to tokens (GTPO) or to whole sequences (GRPO-S).", "tokjax.rl.gtpo", "did not reproduce"),
    Method("rl_zvp", "No Prompt Left Behind: Exploiting Zero-Variance Prompts in LLM Reinforcement Learning via Entropy-Guided Advantage Shaping", "2509.21880", 2025, "rl", "Gives groups of equal rewards an advantage scaled by entropy where GRPO gives none.", "tokjax.rl.zvp", "did not reproduce"),
    Method("rlfh", "On-Policy Self-Alignment with Fine-grained Knowledge Feedback for Hallucination Mitigation", "2406.12221", 2024, "rl", "The policy checks its own statements against retrieved text; the grades become token rewards.", "tokjax.rl.rlfh", "reproduced"),
    Method("rlfr", "RLFR: Extending Reinforcement Learning for LLMs with Flow Environment", "2510.10201", 2025, "rl", "Penalises tokens whose hidden states fit badly to a flow fitted on good text.", "tokjax.rl.rlfr", "reproduced"),
    Method("spo", "Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large Language Models", "2505.23564", 2025, "rl", "Monte Carlo values at segment borders give each segment its own advantage, without a critic.", "tokjax.rl.spo", "reproduced"),
    Method("thinkquel", "Thinkquel: A Model Dedicated to Text-to-dbt Using Synthetic Data and a Span-Aware Objective", "2510.00186", 2025, "rl", "Credits the plan token by token and the query as one sequence, each by its own reward.", "tokjax.rl.ts_grpo", "did not reproduce"),
    Method("tvm", "Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of Large Language Models", "2407.12863", 2024, "rl", "A verifier learns at every token the share of sampled solutions that end right from that prefix.", "tokjax.finetuning.tvm", "did not reproduce"),
    Method("unir", "Universal Reasoner: A Single, Composable Plug-and-Play Reasoner for Frozen LLMs", "2505.19075", 2025, "rl", "Trains a small policy whose logits are added to those of any frozen model of the same vocabulary.", "tokjax.rl.unir", "reproduced"),
    # gflownet
    Method("flower", "Process-Supervised LLM Recommenders via Flow-guided Tuning", "2503.07377", 2025, "gflownet", "Flow through the prefix tree of item titles gives token rewards, so sampling is proportional to popularity.", "tokjax.gflownet.flower", "did not reproduce"),
    Method("lacot", "Latent Chain-of-Thought for Visual Reasoning", "2510.23925", 2025, "gflownet", "Samples rationales from their posterior given the answer by sub-trajectory balance on sparse rewards.", "tokjax.gflownet.lacot", "did not reproduce"),
    # decoding
    Method("budget_guidance", "Steering LLM Thinking with Budget Guidance", "2506.13752", 2025, "decoding", "Multiplies next-token probabilities by the chance to finish thinking within the remaining budget.", "tokjax.decoding.budget.guided", "reproduced"),
    Method("d3_depth_decay", "Position-Aware Depth Decay Decoding (D3): Boosting Large Language Model Inference Efficiency", "2503.08524", 2025, "decoding", "Runs fewer middle layers the later the token, by an exponential law and without training."),
    Method("early_rejection_prm", "Accelerating LLM Reasoning via Early Rejection with Partial Reward Modeling", "2508.01969", 2025, "decoding", "Scores partial reasoning steps in beam search and finishes only the promising ones."),
    Method("grains", "GrAInS: Gradient-based Attribution for Inference-Time Steering of LLMs and VLMs", "2507.18043", 2025, "decoding", "Integrated gradients choose tokens whose removal gives a steering direction for each layer.", "tokjax.steering.grains", "did not reproduce"),
    Method("grouped_speculative_decoding", "Grouped Speculative Decoding for Autoregressive Image Generation", "2508.07747", 2025, "decoding", "Accepts a drafted image token by the probability of a cluster of look-alikes around it."),
    Method("guided_by_gut", "Guided by Gut: Efficient Test-Time Scaling with Reinforced Intrinsic Confidence", "2505.20325", 2025, "decoding", "Tree search led by the model's own confidence and by novelty, after RL has calibrated that confidence.", "tokjax.rl.guided_by_gut", "did not reproduce"),
    Method("layercake", "LayerCake: Token-Aware Contrastive Decoding within Large Language Model Layers", "2507.04404", 2025, "decoding", "Contrasts the intact model with passes that cannot attend to chosen token classes in chosen layers.", "tokjax.decoding.contrast.layercake", "did not reproduce"),
    Method("lookahead_reasoning", "Scaling Speculative Decoding with Lookahead Reasoning", "2506.19830", 2025, "decoding", "Speculates whole reasoning steps and keeps those that mean the same as the target's own."),
    Method("meta_generation_survey", "From Decoding to Meta-Generation: Inference-time Algorithms for Large Language Models", "2406.16838", 2024, "decoding", "Orders decoding in token-level, meta-level and efficient methods; here a checklist for the decoders.", "tokjax.decoding.search", "reproduced"),
    Method("persona_judge", "Persona-judge: Personalized Alignment of Large Language Models via Token-level Self-judgment", "2504.12663", 2025, "decoding", "One model drafts under one preference and judges under another by the speculative test.", "tokjax.decoding.speculative.persona_judge", "reproduced"),
    Method("r2r_routing", "R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token Routing", "2505.21600", 2025, "decoding", "A tiny router hands to the large model only tokens that would change the path of the reasoning."),
    Method("sh2", "SH2: Self-Highlighted Hesitation Helps You Decode More Truthfully", "2401.05930", 2024, "decoding", "Repeats the context's least likely tokens and contrasts predictions with and without them.", "tokjax.decoding.contrast.sh2", "did not reproduce"),
    Method("skipdecode", "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference", "2307.02628", 2023, "decoding", "Layer count falls with position, the same for the whole batch, so caches and batches keep working."),
    Method("think_just_enough", "Think Just Enough: Sequence-Level Entropy as a Confidence Signal for LLM Reasoning", "2510.08146", 2025, "decoding", "Stops reasoning after a pass whose mean top-k entropy lies under a calibrated threshold.", "tokjax.decoding.confidence.thinking", "did not reproduce"),
    # tokenization
    Method("dau_bpe", "Exploring the Benefits of Tokenization of Discrete Acoustic Units", "2406.05547", 2024, "tokenization", "Merges phonemes or acoustic units by BPE before modelling, for shorter and better sequences."),
    Method("dynamic_tokenization", "Retrofitting (Large) Language Models with Dynamic Tokenization", "2411.18553", 2024, "tokenization", "Merges subwords batch by batch and embeds the merged tokens by a hypernetwork."),
    Method("exact_byte_probs", "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and Model Ensembles", "2410.09303", 2024, "tokenization", "Turns a tokenized model into an equivalent byte model, to finish split tokens and mix vocabularies."),
    Method("hierarchical_ar_transformer", "Hierarchical Autoregressive Transformers: Combining Byte- and Word-Level Processing for Robust, Adaptable Language Models", "2501.10322", 2025, "tokenization", "Bytes form word vectors, a backbone models the words, and a small decoder spells the next one.", "tokjax.tokenization.hat", "did not reproduce"),
    Method("mpc_tokenization_bias", "Understanding and Mitigating Tokenization Bias in Language Models", "2406.16829", 2024, "tokenization", "Recovers the character distribution that prompting with a finished tokenization distorts."),
    Method("music_bpe", "Byte Pair Encoding for Symbolic Music", "2301.11975", 2023, "tokenization", "Learns merges over note attributes, so that tokens stand for notes, chords and short motifs."),
    Method("open_vocab_survey", "Between words and characters: A Brief History of Open-Vocabulary Modeling and Tokenization in NLP", "2112.10508", 2021, "tokenization", "Compares words, subwords, characters and bytes by one open-vocabulary measure."),
    Method("semtoken", "SemToken: Semantic-Aware Tokenization for Efficient Long-Context Language Modeling", "2508.15190", 2025, "tokenization", "Merges neighbouring tokens of similar meaning and keeps dense spans in more detail under a budget."),
    Method("spiking_patches", "Spiking Patches: Asynchronous, Sparse, and Efficient Tokens for Event Cameras", "2510.26614", 2025, "tokenization", "Patches of an event camera charge like neurons and emit a token when they spike."),
    Method("temporal_data_tokenization", "The first step is the hardest: Pitfalls of Representing and Tokenizing Temporal Data for Large Language Models", "2309.06236", 2023, "tokenization", "Audits how tokenizers break time stamps and sensor values into inconsistent pieces."),
    Method("tfm_tokenizer", "Tokenizing Single-Channel EEG with Time-Frequency Motif Learning", "2502.16060", 2025, "tokenization", "Quantises time and frequency views of one EEG channel into a vocabulary of motifs."),
    Method("tipa", "Enhancing Character-Level Understanding in LLMs through Token Internal Structure Learning", "2411.17679", 2024, "tokenization", "Teaches the spelling of tokens by listing their characters with positions from last to first.", "tokjax.finetuning.tipa", "did not reproduce"),
    Method("token_awareness", "Tokenization Constraints in LLMs: A Study of Symbolic and Arithmetic Reasoning Limits", "2505.14178", 2025, "tokenization", "Measures how reasoning suffers where a token hides several units of the task."),
    Method("tokenizer_domain_adaptation", "Getting the most out of your tokenizer for pre-training and domain adaptation", "2402.01035", 2024, "tokenization", "Compares sizes, splitting rules and training data, and swaps the tokenizer of a trained model."),
    Method("tokenizer_fairness", "Language Model Tokenizers Introduce Unfairness Between Languages", "2305.15425", 2023, "tokenization", "Measures how many more tokens the same content costs in other languages."),
    Method("toucan", "Toucan: Token-Aware Character Level Language Modeling", "2311.08620", 2023, "tokenization", "Only a small last stack runs per character; the costly layers run once per learned token.", "tokjax.tokenization.toucan", "did not reproduce"),
    # analysis
    Method("clue", "CLUE: Non-parametric Verification from Experience via Hidden-State Clustering", "2510.01591", 2025, "analysis", "Judges a reasoning trace by whether its change of hidden states is nearer to past right or wrong ones."),
    Method("dcsqe", "Alleviating Distribution Shift in Synthetic Data for Machine Translation Quality Estimation", "2502.19941", 2025, "analysis", "Makes near-reference translations with natural errors, graded by a second model, to train estimators.", "tokjax.finetuning.quality_estimation", "did not reproduce"),
    Method("fair_lm_paradox", "The Fair Language Model Paradox", "2410.11985", 2024, "analysis", "Shows by loss per token type that weight decay costs rare tokens what the average hides.", "tokjax.analysis.fair_lm_paradox", "did not reproduce"),
    Method("fiber_bundle_test", "Token Embeddings Violate the Manifold Hypothesis", "2504.01002", 2025, "analysis", "Tests at each token whether the number of neighbours grows with radius as on a manifold."),
    Method("first_hallucination_tokens", "First Hallucination Tokens Are Different from Conditional Ones", "2507.20836", 2025, "analysis", "Measures by position in a hallucinated span how well logit signals reveal its tokens."),
    Method("future_lens", "Future Lens: Anticipating Subsequent Tokens from a Single Hidden State", "2311.04897", 2023, "analysis", "Reads later tokens from one hidden state by linear maps, transplants and learned prompts."),
    Method("info_flow_routes", "Information Flow Routes: Automatically Interpreting Language Models at Scale", "2403.00824", 2024, "analysis", "Traces the important edges of one forward pass back from the predicted token."),
    Method("joint_gcg", "Joint-GCG: Unified Gradient-Based Poisoning Attacks on Retrieval-Augmented Generation Systems", "2506.06151", 2025, "analysis", "Stress-tests one's own retrieval pipeline: how few changed tokens of a passage alter an answer."),
    Method("llm_microscope", "LLM-Microscope: Uncovering the Hidden Role of Punctuation in Context Memory of Transformers", "2502.15007", 2025, "analysis", "Probes per token the non-linearity of layers, the memory of context and the intrinsic dimension."),
    Method("los_net", "Learning on LLM Output Signatures for gray-box LLM Behavior Analysis", "2503.14043", 2025, "analysis", "A small transformer classifies texts from sorted next-token distributions and actual ranks."),
    Method("magikarp", "Fishing for Magikarp: Automatically Detecting Under-trained Tokens in Large Language Models", "2405.05417", 2024, "analysis", "Ranks vocabulary entries by their embeddings and verifies by prompting which were hardly trained."),
    Method("meaningful_signal", "Towards a Universal Method for Meaningful Signal Detection", "2408.00016", 2024, "analysis", "Scores a waveform by the code length of its labels under repeated clustering, without decoding it."),
    Method("mi_peaks", "Demystifying Reasoning Dynamics with Mutual Information: Thinking Tokens are Information Peaks in LLM Reasoning", "2506.02867", 2025, "analysis", "Finds tokens whose states depend most on the solution, and recycles or appends them.", "tokjax.signals.information_peaks", "did not reproduce"),
    Method("rl_watermark", "Learning to Watermark LLM-generated Text via Reinforcement Learning", "2403.10553", 2024, "analysis", "Trains model and detector together, so that ordinary sampling carries the mark.", "tokjax.rl.rl_watermark", "reproduced"),
    Method("thinking_tokens", "Rethinking Thinking Tokens: Understanding Why They Underperform in Practice", "2411.11371", 2024, "analysis", "Compares repeated thinking tokens with chain of thought and explains the gap by cancelling gradients.", "tokjax.pretraining.thinking_tokens", "reproduced"),
    Method("tocsin", "Zero-Shot Detection of LLM-Generated Text using Token Cohesiveness", "2409.16914", 2024, "analysis", "Sharpens a detector's score by how far meaning moves when random tokens are deleted."),
    Method("token_erasure", "Token Erasure as a Footprint of Implicit Vocabulary Items in LLMs", "2406.20086", 2024, "analysis", "Finds implicit words by how fast probes forget the tokens that compose them."),
    Method("transformers_need_glasses", "Transformers need glasses! Information over-squashing in language tasks", "2406.04267", 2024, "analysis", "Measures how the last state of long inputs collapses and which tokens still reach it.", "tokjax.analysis.over_squashing", "did not reproduce"),
    # audio
    Method("ar_speech_enhancement", "Autoregressive Speech Enhancement via Acoustic Tokens", "2507.12825", 2025, "audio", "A transducer reads noisy codec tokens and writes clean ones frame by frame."),
    Method("cosyvoice", "CosyVoice: A Scalable Multilingual Zero-shot Text-to-speech Synthesizer based on Supervised Semantic Tokens", "2407.05407", 2024, "audio", "Speech tokens from a recogniser, a model from text to them, and flow matching to sound."),
    Method("dasb", "DASB -- Discrete Audio and Speech Benchmark", "2406.14294", 2024, "audio", "Compares frozen tokenizers over ten speech tasks with small downstream networks."),
    Method("discrete_audio_survey", "Discrete Audio Tokens: More Than a Survey!", "2506.10274", 2025, "audio", "Classifies audio tokenizers and compares them under one protocol, changing one factor at a time."),
    Method("gense", "GenSE: Generative Speech Enhancement via Language Models using Hierarchical Modeling", "2502.02942", 2025, "audio", "Translates noisy semantic tokens to clean ones, and those to clean acoustic tokens."),
    Method("nast", "NAST: Noise Aware Speech Tokenization for Speech Language Models", "2406.11037", 2024, "audio", "Learns units over a frozen speech encoder that stay the same under noise and speaker."),
    Method("pcg_acceptance", "Principled Coarse-Grained Acceptance for Speculative Decoding in Speech", "2511.13732", 2025, "audio", "Verifies drafted acoustic tokens by overlapping groups, exactly at the level of groups."),
    Method("prosody_whisper", "Non-verbal information in spontaneous speech -- towards a new framework of analysis", "2403.03522", 2024, "audio", "Tunes a recogniser to write intonation units, their contours and emphasis beside the words."),
    Method("scpc", "Segmental Contrastive Predictive Coding for Unsupervised Word Segmentation", "2106.02170", 2021, "audio", "Learns frames, boundaries and segments together by contrast at two levels, without labels."),
    Method("sink_decorrelation", "Mitigating Attention Sinks and Massive Activations in Audio-Visual Speech Recognition with LLMs", "2510.22603", 2025, "audio", "A loss pushes intermediate states away from the first token's and removes the sinks there.", "tokjax.pretraining.sink_decorrelation", "did not reproduce"),
    Method("stab_benchmark", "STAB: Speech Tokenizer Assessment Benchmark", "2409.02384", 2024, "audio", "Judges tokenizers by their streams alone: invariance, robustness, compressibility and spread."),
    Method("stabletoken", "StableToken: A Noise-Robust Semantic Speech Tokenizer for Resilient SpeechLLMs", "2509.22220", 2025, "audio", "Several binary projections vote bit by bit, so that noise rarely changes a speech token."),
    Method("tokenverse", "TokenVerse: Towards Unifying Speech and NLP Tasks via Transducer-based ASR", "2407.04444", 2024, "audio", "One transducer writes the words and marks speaker changes, end points and entities among them."),
    Method("universal_speech_tokens", "Towards Universal Speech Discrete Tokens: A Case Study for ASR and TTS", "2309.07377", 2023, "audio", "Asks whether one token a frame serves both recognition and synthesis, with token augmentation."),
    Method("vae_gslm", "A Variational Framework for Improving Naturalness in Generative Spoken Language Models", "2506.14767", 2025, "audio", "Learns continuous latents beside semantic tokens for the prosody that tokens miss."),
    Method("wavtokenizer", "WavTokenizer: an Efficient Acoustic Discrete Codec Tokenizer for Audio Language Modeling", "2408.16532", 2024, "audio", "A codec with a single quantiser: 40 or 75 tokens for a second of sound."),
    # vision
    Method("cat_pruning", "CAT Pruning: Cluster-Aware Token Pruning For Text-to-Image Diffusion Models", "2502.00433", 2025, "vision", "Recomputes only the image tokens whose predicted noise moved, spread over spatial clusters."),
    Method("follow_the_flow", "Follow the Flow: On Information Flow Across Textual Tokens in Text-to-Image Models", "2504.01137", 2025, "vision", "Asks by interventions which text token carries an item's meaning and where items leak."),
    Method("hi_mar", "Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots", "2505.20288", 2025, "vision", "Generates a few coarse tokens first and the dense ones conditioned on them."),
    Method("padding_tone", "Padding Tone: A Mechanistic Analysis of Padding Tokens in T2I Models", "2501.06751", 2025, "vision", "Swaps padding in the encoder or in the diffusion steps to see whether it carries meaning."),
    Method("scaling_ar", "Go with Your Gut: Scaling Confidence for Autoregressive Image Generation", "2509.26376", 2025, "vision", "Ends weak candidates early and sets guidance by a running confidence of token entropies."),
    Method("seed_tokenizer", "Planting a SEED of Vision in Large Language Model", "2307.08041", 2023, "vision", "Turns an image into 32 causal semantic codes that a language model reads and writes."),
    Method("semanticist", "\"Principal Components\" Enable A New Language of Images", "2503.08685", 2025, "vision", "An image tokenizer whose tokens are ordered by how much of the picture they explain."),
    Method("slt_grounding", "Grounding or Guessing? Visual Signals for Detecting Hallucinations in Sign Language Translation", "2510.18439", 2025, "vision", "Measures how much each translated token depends on the video."),
    Method("sparkui_parser", "SparkUI-Parser: Enhancing GUI Perception with Robust Grounding and Parsing", "2509.04908", 2025, "vision", "A special token a screen element sends its state to a decoder of continuous boxes, or rejects."),
    Method("token_activation_map", "Token Activation Map to Visually Explain Multimodal LLMs", "2506.23270", 2025, "vision", "Heat maps of each generated token over the image, less what earlier tokens explain."),
    Method("token_ocr", "A Token-level Text Image Foundation Model for Document Understanding", "2503.02304", 2025, "vision", "Aligns image pixels with subword embeddings, so that pictures of text can be searched by token."),
    Method("tpg", "Token Perturbation Guidance for Diffusion Models", "2506.10036", 2025, "vision", "Guides diffusion away from a pass whose tokens were shuffled, without condition or training."),
    Method("transprune", "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", "2507.20630", 2025, "vision", "Drops the image tokens that layers transform least and instructions attend to least."),
    Method("xar", "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation", "2502.20388", 2025, "vision", "Predicts patches, cells or scales one after another by flow matching under noisy context."),
    # series
    Method("timercd", "Towards Foundation Models for Zero-Shot Time Series Anomaly Detection: Leveraging Synthetic Data and Relative Context Discrepancy", "2509.21190", 2025, "series", "A transformer trained on synthetic anomalies labels each step of an unseen series against its context."),
    Method("tokencast", "From Values to Tokens: An LLM-Driven Framework for Context-aware Time Series Forecasting via Symbolic Discretization", "2508.09191", 2025, "series", "Quantises a series into tokens of the language model, which then forecasts with text as context."),
    # recsys
    Method("discrec", "DiscRec: Disentangled Semantic-Collaborative Modeling for Generative Recommendation", "2506.15576", 2025, "recsys", "Adds positions inside item codes and a gated branch of collaborative signals to the embeddings.", "tokjax.recsys.training", "did not reproduce"),
    # retrieval
    Method("dear", "DeAR: Dual-Stage Document Reranking with Reasoning Agents via LLM Distillation", "2508.16998", 2025, "retrieval", "Distils pointwise scores into a small model, then tunes it to reorder the top by reasoning.", "tokjax.retrieval.dear", "did not reproduce"),
    Method("mexma", "MEXMA: Token-level objectives improve sentence representations", "2409.12737", 2024, "retrieval", "Rebuilds masked tokens of one language from the other's sentence vector, beside aligning both.", "tokjax.pretraining.mexma", "did not reproduce"),
    Method("mind_retrieval", "Memory-Aware and Uncertainty-Guided Retrieval for Multi-Hop Question Answering", "2503.23095", 2025, "retrieval", "Retrieves when generated words are uncertain and influential, and remembers confident facts."),
    # prompts
    Method("pmpo", "PMPO: Probabilistic Metric Prompt Optimization for Small and Large Language Models", "2505.16307", 2025, "prompts", "Rewrites prompts by the cross-entropy of gold answers, with no sampling and no judge."),
    Method("uniapo", "UniAPO: Unified Multimodal Automated Prompt Optimization", "2508.17890", 2025, "prompts", "Alternates feedback and refinement of prompts with memories of both."),
)
# fmt: on

METHODS: tuple[Method, ...] = tuple(sorted(_ROWS, key=lambda m: (m.family, m.slug)))
