"""From files, folders and datasets to records: texts, chats and preferences, bad ones counted."""
