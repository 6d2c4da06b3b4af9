"""Model files of every kind: recognised, checked, read and written.

A place is told apart by hub.py (path, or id of the hub) and lora_place.py (a LoRA, or not). model_files.py reads a
model's small files, a folder's JSON or a single file's header (safetensors_header.py), and has them judged:
recognise.py says what something is by the names in it, alignable.py whether it can be aligned. Weights are read only
then: of a folder those that folder_weights.py chooses, of a single file by single_file.py under the original names
(original_keys.py), of a LoRA by lora_files.py; ../loading.py makes a pipeline of them. Written are a folder by
diffusers_folder.py, a single file with what programs want to know of it by safetensors_metadata.py.
"""
