"""Files that others write and read: LoRA files under every app's names (`lora_files`), checkpoint folders (`layout`).

For the modules of text_to_image, to be imported by module. Builds on families.
"""
