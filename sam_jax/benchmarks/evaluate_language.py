"""Perplexity on a text, or accuracy on sentences, of a model's folder: docs/quantization.md.

    python -m sam_jax.benchmarks.evaluate_language FOLDER --text=FILE [--bits=8,4,2]
    python -m sam_jax.benchmarks.evaluate_language FOLDER --table=FILE --classes=2 [--bits=8,4,2]

The folder is one of transformers' `save_pretrained`, with the files of its tokenizer: of an OPT
config.json, model.safetensors, vocab.json and merges.txt, of a BERT with a head for sentences
config.json, model.safetensors and vocab.txt. The table has tabs between its columns and their names
in its first line, as GLUE's. Figures are of full precision and of kernels that are rounded to so
many bits per output channel, with activations of 8 bits per token.
"""

import argparse
import functools
import pathlib

import jax
import numpy as np

from sam_jax import tables
from sam_jax.benchmarks.quantize_language import ACTIVATION_BITS
from sam_jax.cli import commands
from sam_jax.errors import UserError
from sam_jax.language import measures, sentences, texts, tokenizers
from sam_jax.models import language_files
from sam_jax.models.language import Decoder
from sam_jax.quantization import quantize_kernels, quantized_inputs


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=pathlib.Path, help='With config.json and weights.')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--text', default='', help='A file with a text, of a decoder.')
    what.add_argument('--table', default='', help='A table of sentences, of an encoder.')
    parser.add_argument('--columns', default='sentence', help='Of one text, or of two: q1,q2.')
    parser.add_argument('--label', default='label', help='The column of the class.')
    parser.add_argument('--classes', type=int, default=2, help='Number of classes.')
    parser.add_argument('--cased', action='store_true', help='The model knows capitals.')
    parser.add_argument('--length', type=int, default=128, help='Tokens of a window or sentence.')
    parser.add_argument('--batch', type=int, default=8, help='Of them at a time.')
    parser.add_argument('--bits', default='8,4,2', help='Bits of the kernels.')
    args = parser.parse_args()

    num_classes = args.classes if args.table else 0
    model, variables = language_files.load_folder(args.folder, num_classes)
    settings = {'W32A32': variables['params']}
    for bits in map(int, args.bits.split(',')):
        rounded = quantize_kernels(variables['params'], bits, per_channel=True)
        settings[f'W{bits}A{ACTIVATION_BITS}'] = rounded

    @functools.partial(jax.jit, static_argnames=('bits',))
    def apply(params, *inputs, bits):
        with quantized_inputs(bits):
            return model.apply({'params': params}, *inputs)

    def logits_of(setting):
        bits = None if setting == 'W32A32' else ACTIVATION_BITS
        return functools.partial(apply, settings[setting], bits=bits)

    if args.table:
        columns = args.columns.split(',')
        read = sentences.read(
            args.table, columns[0], args.label, columns[1] if len(columns) > 1 else None
        )
        if read.labels.max() >= num_classes:
            raise UserError(
                f'{args.table}: there is a class {read.labels.max()}; --classes is {num_classes}.'
            )
        tokenizer = tokenizers.WordPiece(args.folder / 'vocab.txt', lower=not args.cased)
        inputs = sentences.encode(read, tokenizer, args.length)
        rows = [
            (s, f'{measures.of_sentences(logits_of(s), inputs, read.labels, args.batch):.2f}')
            for s in settings
        ]
        head = ('setting', 'accuracy (%)')
    else:
        if not isinstance(model, Decoder):
            raise UserError(f'{args.folder}: a BERT has no perplexity; --text is of an OPT.')
        text = texts.read(args.text)
        print(text.described())
        tokenizer = tokenizers.BytePairs(args.folder / 'vocab.json', args.folder / 'merges.txt')
        windows = texts.windows(np.asarray(tokenizer.encode(text.text)), args.length)
        rows = []
        for setting in settings:
            total = measures.of_text(logits_of(setting), windows, batch=args.batch)
            rows.append((setting, f'{total.perplexity:.3f}', f'{total.bits:.4f}', total.tokens))
        head = ('setting', 'perplexity', 'bits per token', 'tokens')
    print(tables.markdown(head, rows))


if __name__ == '__main__':
    try:
        main()
    except (UserError, OSError) as e:
        commands.leave(str(e))
