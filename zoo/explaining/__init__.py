"""Looking inside a network: what it looks at, what fools it, and the pictures that it would like to see.

Plain functions that take any ``nn.Module``, of the zoo or not, that maps images (N, C, H, W) in [0, 1] to scores
(N, K); one that wants them standardised goes behind a layer that does so:

    network = nn.Sequential(Standardize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), torchvision.models.resnet18())
    maps = grad_cam(network, images, "1.layer4", targets=207)

Layers are named as ``named_modules()`` and ``zoo show`` name them. The network is left as it was: its mode, its hooks,
its gradients. The command line's ``zoo explain`` does the same with a checkpoint and files.
"""
