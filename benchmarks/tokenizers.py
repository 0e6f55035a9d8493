"""Measures how fast tokenizers encode a corpus, compared with the library that each is built on.

    python benchmarks/tokenizers.py CORPUS sentencepiece=llama2/tokenizer.model tiktoken=llama3/tokenizer.model hf=FOLDER

CORPUS is a text file; its paragraphs are the documents. Prints megabytes per second (the median of five passes in turn) and their ratio.
"""

import os
import pathlib
import statistics
import sys
import time

from llama_eqx.data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer
from llama_eqx.data.tokenizer.huggingface import read_huggingface

corpus, *pairs = sys.argv[1:]
documents = [part for part in pathlib.Path(corpus).read_text().split("\n\n") if part]
documents = ["\n\n".join(documents[i : i + 20]) for i in range(0, len(documents), 20)]
size, threads = sum(len(document.encode()) for document in documents) / 1e6, os.cpu_count() or 1
print(f"{len(documents)} documents, {size:.2f} MB, {threads} threads")
for pair in pairs:
    kind, _, path = pair.partition("=")
    file = pathlib.Path(path)
    if kind == "sentencepiece":
        ours = SentencePieceTokenizer(file.read_bytes())
        library = lambda pieces=ours.pieces: pieces.encode(documents, num_threads=threads)  # noqa: E731
    elif kind == "tiktoken":
        ours = TiktokenTokenizer(file.read_bytes())
        library = lambda encoding=ours.encoding: encoding.encode_ordinary_batch(documents, num_threads=threads)  # noqa: E731
    else:
        ours = read_huggingface(file)
        library = lambda library=ours.library: library.encode_batch_fast(documents, add_special_tokens=False)  # noqa: E731
    seconds = {"ours": [], "library": []}
    for _ in range(5):
        for name, encode in {"ours": lambda ours=ours: ours.encode_all(documents), "library": library}.items():
            begin = time.perf_counter()
            encode()
            seconds[name].append(time.perf_counter() - begin)
    rate = {name: size / statistics.median(found) for name, found in seconds.items()}
    print(f"{kind}: {rate['ours']:.2f} MB/s, the library alone {rate['library']:.2f} MB/s, ratio {rate['ours'] / rate['library']:.2f}")
