"""The page: people look at stored scores, ask about new text and follow a running job. Reads through the catalog alone."""

from launch.page.mount import mount_page

__all__ = ["mount_page"]
