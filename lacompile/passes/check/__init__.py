"""What is asked of a match before it is written: may it be cut out, is it worth it, does it compute the same?"""
