"""A page that only shows: what would change or begin anything is refused, and its buttons are out of sight."""

import gradio as gr

WORDS = "This page only shows: it was started with --read-only."
CHANGES = frozenset(  # the handlers that write, delete, begin or end something, by name; a check may draw data
    {
        *("on_start", "on_start_demo", "on_upload", "on_use", "on_save", "on_yaml", "on_check", "asked_check"),
        *(
            "stop",
            "resume",
            "sample",
            "delete",
            "ask_delete",
            "save_notes",
            "put_away",
            "delete_several",
            "make_export",
        ),
        *("start", "start_from_files", "end_job", "delete_comparison", "say"),
        *("save_preset", "ask_delete_preset", "delete_preset"),
        *("show_pair", "prefer_a", "prefer_b", "prefer_neither"),
    }
)


def close(blocks: gr.Blocks) -> None:
    """Takes from a page all that changes anything."""
    for event in blocks.fns.values():
        if event.name in CHANGES:
            event.fn, event.inputs_as_dict = _refuse, False
            for id, _ in event.targets:
                if isinstance(button := blocks.blocks.get(id or 0), gr.Button | gr.UploadButton | gr.File):
                    button.visible = False


def _refuse(*sent: object) -> None:
    raise gr.Error(WORDS, print_exception=False)
