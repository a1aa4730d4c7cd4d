"""Operations: tasks in sequence, advanced by messages."""
