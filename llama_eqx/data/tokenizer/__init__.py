"""From text to ids and back."""

from llama_eqx.data.tokenizer.base import Tokenizer, TokenizerConfig
from llama_eqx.data.tokenizer.find import find_tokenizer, load_tokenizer
from llama_eqx.data.tokenizer.huggingface import HuggingFaceTokenizer, HuggingFaceTokenizerConfig
from llama_eqx.data.tokenizer.plain import BytesTokenizer, BytesTokenizerConfig, CharsTokenizer, CharsTokenizerConfig
from llama_eqx.data.tokenizer.sentencepiece import SentencePieceTokenizer, SentencePieceTokenizerConfig
from llama_eqx.data.tokenizer.tiktoken import TiktokenTokenizer, TiktokenTokenizerConfig

__all__ = [
    "BytesTokenizer",
    "BytesTokenizerConfig",
    "CharsTokenizer",
    "CharsTokenizerConfig",
    "HuggingFaceTokenizer",
    "HuggingFaceTokenizerConfig",
    "SentencePieceTokenizer",
    "SentencePieceTokenizerConfig",
    "TiktokenTokenizer",
    "TiktokenTokenizerConfig",
    "Tokenizer",
    "TokenizerConfig",
    "find_tokenizer",
    "load_tokenizer",
]
