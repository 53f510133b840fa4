"""ConAdv on the embeddings of a token model, in FreeLB's ball: python docs/examples/embeddings.py"""

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import conadv_lab as cl

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))
ids, lengths = torch.randint(3, 50, (96, 12)), torch.randint(4, 13, (96, 1))
mask = (torch.arange(12) < lengths).long()
parts = zip(ids, mask, ids[:, 0] % 3, strict=True)
rows = [{"input_ids": one, "attention_mask": real, "labels": label} for one, real, label in parts]
loader = DataLoader(rows, batch_size=16, shuffle=True)

attack = cl.PGDAttack(epsilon=0.3, step=0.2, steps=1, norm="l2", bounds=None)
method = cl.ConAdv(attack, staleness=1, weights=(0.5, 0.5))
# method = cl.DisAdv(attack, weights=(0.5, 0.5))
# method = cl.Recycled(0.3, norm="l2", bounds=None)
optimizer, criterion = torch.optim.AdamW(model.parameters(), lr=2e-3), nn.CrossEntropyLoss()
layer = model.get_input_embeddings()
for step in cl.lookahead(loader, steps=60, ahead=method.lookahead, embeddings=layer):
    losses = method.backward(model, step, criterion)
    optimizer.step()
    optimizer.zero_grad()
    if step.number % 20 == 19:
        print(step.number, losses.clean.item(), losses.adversarial.item())
