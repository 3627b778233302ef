"""Pretrain the demo LM: a 6-layer GPT-NeoX on the source text of the Python standard library.

    python demo/make_lm.py --out demo/lm --steps 4500

Nothing is downloaded. The tokenizer is a byte-level BPE trained on the same files. The weights are
saved in bfloat16; the last line printed is the cross-entropy on files that training never saw.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from make_text import is_held_out, stdlib_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
BLOCK = 256


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, the end of a document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, bos_token=EOS)


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Token blocks [n BLOCK] of the documents joined by the end-of-document token."""
    ids = [i for d in tokenizer(texts).input_ids for i in (*d, tokenizer.eos_token_id)]
    whole = len(ids) // BLOCK * BLOCK
    return torch.tensor(ids[:whole]).view(-1, BLOCK)


@torch.no_grad()
def held_out_loss(lm: GPTNeoXForCausalLM, blocks: torch.Tensor) -> float:
    """Mean next-token cross-entropy in nats."""
    lm.eval()
    losses = [lm(b, labels=b).loss.item() * len(b) for b in blocks.split(32)]
    lm.train()
    return sum(losses) / len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "lm")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=16, help="blocks of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()

    torch.manual_seed(0)
    documents = list(stdlib_documents())
    train_texts = [text for name, text in documents if not is_held_out(name)]
    held_out_texts = [text for name, text in documents if is_held_out(name)]
    tokenizer = train_tokenizer(train_texts, args.vocab)
    train, held_out = pack(train_texts, tokenizer), pack(held_out_texts, tokenizer)[:512]
    print(f"{train.numel():,} training tokens, {held_out.numel():,} held-out tokens")

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        intermediate_size=4 * args.hidden,
        max_position_embeddings=2 * BLOCK,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    lm = GPTNeoXForCausalLM(config)
    decay = [p for p in lm.parameters() if p.ndim >= 2]
    rest = [p for p in lm.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    started = time.monotonic()
    epochs = 1 + args.steps * args.batch // len(train)
    order = torch.cat([torch.randperm(len(train)) for _ in range(epochs)])
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * cosine)
        batch = train[order[step * args.batch : (step + 1) * args.batch]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = lm(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            rate = (step + 1) * batch.numel() / (time.monotonic() - started)
            print(f"step {step} loss {loss.item():.3f} {rate:,.0f} tokens/s", flush=True)

    minutes = (time.monotonic() - started) / 60
    lm.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    saved = GPTNeoXForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    record = {
        "parameters": sum(p.numel() for p in lm.parameters()),
        "steps": args.steps,
        "tokens": args.steps * args.batch * BLOCK,
        "minutes": round(minutes, 1),
        "heldout_cross_entropy": round(held_out_loss(saved, held_out), 4),
        "ln_vocab": round(math.log(len(tokenizer)), 4),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
