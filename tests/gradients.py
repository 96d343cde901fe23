"""What tests of the loss compare: its value and the gradient of the logits."""


def value_and_gradient(loss, logits, labels, **arguments):
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, labels, **arguments)
    value.sum().backward()
    return value.detach(), leaf.grad
