"""What several ranks hold under one name, of which one rank's copy is saved: do they hold the same?"""
