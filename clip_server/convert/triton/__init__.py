"""A model as a repository for NVIDIA's Triton Inference Server.

text_embedding, image_embedding   ensembles, for clients: a text or an image to its embedding
zero_shot                         an image and prompts to logits and probabilities
clip_text, clip_image             preprocessing, in Triton's python backend
clip_textual, clip_visual         the towers, in the backend that `--towers` names

A repository is complete: its preprocessing models carry this package's tokenizer and image code,
which need numpy, Pillow, tokenizers and ftfy, but neither Jina nor docarray nor torch.
"""
