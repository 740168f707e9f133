"""What several test modules share: folders, rows, commands, small models, servers. A test imports no other test."""
