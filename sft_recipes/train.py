"""stub while composing"""
def main(config, composed):
    print(config)
    return 0.0
