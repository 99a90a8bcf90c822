"""`w8a8 verify`: is this W8A8 checkpoint what it should be, given its source?"""
