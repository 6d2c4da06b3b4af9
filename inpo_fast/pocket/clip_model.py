"""A CLIP in miniature for the pocket world: a judge that no reward was made from, for the path that PickScore takes.

It also sees the size of the base's noise prediction, so it does not decide there (docs/judges.md); reader.py does.
Trained contrastively on rendered scenes of every finish, so it knows what a caption means and cares little
about looks. Same classes and file layout as CLIP-H or PickScore; read by inpo_fast.judges.clip. It sees all
combinations, the held-out ones too: it judges, it does not draw.
"""

from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from inpo_fast.judges.pocket_scenes import SIZE, Scene
from inpo_fast.pocket.base_model import MAX_TOKENS, WIDTH, one_cycle, render_training_set

PICTURES, STEPS, BATCH, LR = 24_000, 1_000, 128, 2e-3
MEAN = STD = [0.5, 0.5, 0.5]


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    shared = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **shared,
                "num_hidden_layers": 2,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": MAX_TOKENS,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**shared, "num_hidden_layers": 3, "image_size": SIZE, "patch_size": 4},
            projection_dim=WIDTH,
        )
    )


def train_clip(scenes: list[Scene], tokenizer: CLIPTokenizer, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    pixels, captions = render_training_set(scenes, PICTURES, seed + 1)
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    clip = make_clip(tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, STEPS))
    order = torch.Generator().manual_seed(seed)
    for step in track(range(STEPS), description="clip"):
        pick = torch.randint(len(pixels), (BATCH,), generator=order)
        out = clip(input_ids=ids[pick], pixel_values=pixels[pick])
        # pictures of the same caption are all right answers to it
        same = (ids[pick][:, None] == ids[pick][None]).all(-1).float()
        wanted = same / same.sum(1, keepdim=True)
        loss = -(wanted * out.logits_per_image.log_softmax(1)).sum(1).mean() / 2
        loss = loss - (wanted * out.logits_per_text.log_softmax(1)).sum(1).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            best = out.logits_per_image.argmax(1)
            right = np.mean([bool(same[i, j]) for i, j in enumerate(best.tolist())])
            print(f"clip step {step}: loss {loss.item():.3f}, right caption of {BATCH}: {right:.2f}", flush=True)
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
