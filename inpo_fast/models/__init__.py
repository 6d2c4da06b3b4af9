"""Model families behind one interface, their weights, and their fast paths.

denoiser.py says what a family is, unet.py is the one there is, families.py the table of them. loading.py opens a
pipeline (files/ has what that takes), random_weights.py draws one; models.py makes policy and reference of it, whose
trained parameters master_weights.py keeps (zero1.py: in parts). fast/ has kernels and compiled blocks inside a UNet,
lora.py adapters. shapes.py and peak_memory.py are for counts on the meta device.
"""
