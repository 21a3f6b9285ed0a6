"""Tokenizers that are made on the spot: one token a word for the demo's task, one token a byte for any text.

Both are transformers fast tokenizers with the same special tokens and the same ChatML template; `save_pretrained`
writes a directory that `AutoTokenizer` and vLLM load without a network.
"""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_coreward.demo.task import Sum, template_texts

PAD, START, END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
ROLE_LINES = ("system\n", "user\n", "assistant\n")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The spaces around a word and after a stop belong to its token, digits stand alone: no token is spent on a space, and
# text is the plain concatenation of its tokens.
_PIECES = r"\\boxed\{|[a-z]+\n| ?[A-Za-z]+ ?|[.,;?] ?|.|\n"


def word_level_tokenizer() -> PreTrainedTokenizerFast:
    """Words, single digits, signs and `\\boxed{` as tokens; what the task never writes becomes `<unk>`.

    For any family but qwen2, whose tokenizers transformers 5 takes to be byte-level whatever the files say.
    """
    pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    texts = [*template_texts(), Sum((10, 10, 10), ("+", "-")).response, *ROLE_LINES, "0123456789", "\n", " "]
    words = {piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text)}
    vocabulary = [PAD, START, END, UNKNOWN, *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk_token=UNKNOWN)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """The 256 bytes as tokens, for small random models on real text; nothing is unknown to it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, START, END, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()  # as Qwen's own have it
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,  # would eat spaces before punctuation
        **special,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
